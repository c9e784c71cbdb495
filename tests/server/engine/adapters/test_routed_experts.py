"""Routed experts through the whole engine, against one expert after the other in float32."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan, RoutingStrategy
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import AdapterUnservable
from loraplex_server.engine.requests.events import FinishReason
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.plan_executor import plan_logits
from tests.support.adapters.routed_plans import (
    lora_plan,
    mixlora_plan,
    projection_plan,
    scaled_plan,
)
from tests.support.bases.architectures import VOCAB_SIZE, tiny_model
from tests.support.servers.engines import Answer, generate_all, running_engine

N_TOKENS = 8
GREEDY = SamplingParams(max_tokens=N_TOKENS, temperature=0.0, prompt_logprobs=1, logprobs=1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plans(model: PreTrainedModel) -> dict[str, AdapterPlan | None]:
    return {
        "base": None,
        "lora": lora_plan(model, rank=8, seed=1),
        "mixlora": mixlora_plan(model, n_experts=8, top_k=2, rank=16, seed=2),
        "mixlora of one": mixlora_plan(model, n_experts=3, top_k=1, rank=4, expert_rank=7, seed=3),
        "dynamic": mixlora_plan(
            model, n_experts=4, top_k=2, rank=3, seed=4, strategy=RoutingStrategy.TOP_P
        ),
        "switch": mixlora_plan(
            model, n_experts=4, top_k=1, rank=3, seed=5, strategy=RoutingStrategy.SWITCH
        ),
        "mola": projection_plan(model, n_experts=4, top_k=2, ranks=(2, 5), seed=6),
        "loramoe": projection_plan(
            model,
            n_experts=3,
            top_k=3,
            ranks=(4,),
            seed=7,
            strategy=RoutingStrategy.DENSE,
            leaves=("gate_proj", "up_proj", "down_proj"),
        ),
        "dynamic without experts' factors": _gates_only(model, RoutingStrategy.TOP_P, seed=8),
        "switch without experts' factors": _gates_only(model, RoutingStrategy.SWITCH, seed=9),
        "ia3": scaled_plan(model, seed=11),
        "lora on scaled inputs": scaled_plan(model, seed=12, rank=3),
        "mola by layer": _fewer_experts_below(
            projection_plan(model, n_experts=4, top_k=2, ranks=(2, 3), seed=10)
        ),
    }


def _gates_only(model: PreTrainedModel, strategy: RoutingStrategy, seed: int) -> AdapterPlan:
    """As of a MixLoRA on attention only: its gates still scale the MLP blocks."""
    plan = mixlora_plan(model, n_experts=4, top_k=1, rank=3, seed=seed, strategy=strategy)
    bare = {name: replace(e, experts=({},) * len(e.experts)) for name, e in plan.experts.items()}
    return replace(plan, experts=bare)


def _fewer_experts_below(plan: AdapterPlan) -> AdapterPlan:
    """Two experts instead of four in layer 0, as MoLA has them."""
    fewer = {
        name: replace(block, gate=block.gate[:2], experts=block.experts[:2])
        if ".layers.0." in name
        else block
        for name, block in plan.experts.items()
    }
    return replace(plan, experts=fewer)


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "modules"])
def engine(model: PreTrainedModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running_engine(model, fuse=request.param, max_loras=64) as running:
        yield running


def _prompts(n: int, seed: int = 3) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (5 + 3 * i,), generator=g).tolist() for i in range(n)]


def _oracle(model: PreTrainedModel, plan: AdapterPlan | None, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [n_tokens, vocab] of the whole sequence, in one go."""
    ids = torch.tensor([tokens])
    if plan is None:
        with torch.inference_mode():
            return torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
    return torch.log_softmax(plan_logits(model, plan, ids)[0], dim=-1)


def test_every_kind_of_routed_adapter_shares_steps_with_plain_ones_exactly(
    model: PreTrainedModel, engine: Engine, plans: dict[str, AdapterPlan | None]
) -> None:
    kinds = [*plans, "mixlora", "lora", "base"]
    prompts = _prompts(len(kinds))
    answers = generate_all(engine, prompts, GREEDY, [plans[kind] for kind in kinds])
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        tokens = prompt + answer.token_ids
        want = _oracle(model, plans[kind], tokens)
        assert answer.finish is FinishReason.LENGTH, answer.last.error
        assert answer.token_ids == want[len(prompt) - 1 : -1].argmax(dim=-1).tolist(), kind
        given = [lp for lp in answer.events[0].prompt_logprobs if lp is not None]
        given += [lp for event in answer.events for lp in event.logprobs]
        assert len(given) == len(tokens) - 1
        got = torch.tensor([lp.logprob for lp in given])
        expected = want[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
        assert float((got - expected).abs().max()) <= 1e-4, kind


def test_a_routed_adapter_answers_alone_what_it_answers_in_a_crowd(
    engine: Engine, plans: dict[str, AdapterPlan | None]
) -> None:
    prompts = _prompts(4, seed=9)
    crowd = [plans[kind] for kind in ("mixlora", "mola", "lora", "dynamic")]
    together = generate_all(engine, prompts, GREEDY, crowd)
    for prompt, plan, answer in zip(prompts, crowd, together, strict=True):
        alone = generate_all(engine, [prompt], GREEDY, [plan])
        assert alone[0].token_ids == answer.token_ids


def test_the_prefix_cache_serves_routed_adapters_and_keeps_them_apart(
    engine: Engine, plans: dict[str, AdapterPlan | None]
) -> None:
    prompt = _prompts(1, seed=11)[0] * 8
    sampling = SamplingParams(max_tokens=N_TOKENS, temperature=0.0)

    def ask(kind: str) -> Answer:
        return generate_all(engine, [prompt], sampling, [plans[kind]])[0]

    first, other, again = ask("mixlora"), ask("mixlora of one"), ask("mixlora")
    assert again.events[0].n_cached > 0
    assert other.events[0].n_cached == 0
    assert again.token_ids == first.token_ids
    assert other.token_ids != first.token_ids


def test_a_plan_that_no_store_has_checked_fails_alone_when_it_cannot_be_served(
    engine: Engine, plans: dict[str, AdapterPlan | None]
) -> None:
    plan = plans["mixlora"]
    assert plan is not None
    block = next(iter(plan.experts.values()))
    stray = replace(plan, digest="e" * 64, experts={"model.layers.0.attic": block})
    answer, other = generate_all(engine, _prompts(2), GREEDY, [stray, None], prepared=False)
    assert answer.finish is FinishReason.ERROR
    assert isinstance(answer.last.error, AdapterUnservable)
    assert "attic" in str(answer.last.error)
    assert other.finish is FinishReason.LENGTH


def test_expert_load_counts_every_row_k_times_in_every_layer(
    engine: Engine, plans: dict[str, AdapterPlan | None]
) -> None:
    plan = plans["mixlora"]
    assert plan is not None
    fresh = replace(plan, digest="f" * 64)
    prompt = _prompts(1, seed=21)[0]
    generate_all(engine, [prompt], SamplingParams(max_tokens=N_TOKENS, temperature=0.0), [fresh])
    load = engine.experts.load(fresh.digest, window_s=1e9)
    assert load is not None
    n_rows = len(prompt) + N_TOKENS - 1  # the last token is not run
    assert {sum(counts) for counts in load.counts.values()} == {2 * n_rows}
    assert set(load.counts) == set(plan.experts)
    assert engine.experts.digests()[0] == fresh.digest
    assert engine.experts.load("0" * 64, window_s=60.0) is None
