"""Adapters beyond low-rank factors through the whole engine, each beside all others in one batch.

PEFT's own modules are the oracle, greedy answers and log-probabilities in float32 its answers.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.composites.mixture import mix_plans, mixture_digest
from loraplex_adapter_store.contents.plan_file import pack_plan, parse_plan
from loraplex_adapter_store.errors import InvalidSelector
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.cpu import native
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.round_trip import TOLERANCE, randomise
from tests.support.bases.tiny_models import read_path, tiny_llama, untouched
from tests.support.servers.engines import Answer, generate_all, running_engine

N_TOKENS = 6
GREEDY = SamplingParams(max_tokens=N_TOKENS, temperature=0.0, logprobs=0, prompt_logprobs=0)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS: Mapping[str, peft.PeftConfig] = {
    "Kronecker": peft.LoKrConfig(r=4, alpha=6, target_modules=ALL),
    "Circulant": peft.C3AConfig(block_size=4, target_modules=ALL),
    "SparseDelta": peft.ShiraConfig(r=3, target_modules=[*ALL, "lm_head"]),
    "sparse beside low-rank": peft.SupertuningConfig(
        sparsity=0.9, r=3, lora_alpha=5, target_modules=ALL
    ),
    "FourierDelta": peft.FourierFTConfig(n_frequency=60, target_modules=ALL),
    "DenseDelta": peft.MissConfig(r=4, init_weights="bat", target_modules=ALL),
    "MaskedWeight": peft.HiraConfig(r=3, target_modules=ALL),
    "masked weight beside low-rank": peft.GloraConfig(r=3, target_modules=ALL),
    "BlockRotation": peft.OFTConfig(oft_block_size=4, r=0, target_modules=ALL),
    "ButterflyRotation": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "PairRotation": peft.RoadConfig(group_size=4, target_modules=ALL),
    "shared basis": peft.VeraConfig(r=5, target_modules=ALL),
    "input scale": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "input scales of packed linears": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "up_proj", "down_proj"],
        feedforward_modules=["v_proj", "up_proj", "down_proj"],
    ),
    "plain": peft.LoraConfig(r=4, target_modules=ALL),
}
SOME_TOKENS = list(range(0, 64, 3))
# What has a weight of its own, and what changes the base's weight there.
ON_ONE_WEIGHT: Mapping[str, tuple[peft.PeftConfig, ...]] = {
    "rows of the embedding": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        peft.LoraConfig(
            target_modules=["q_proj"], trainable_token_indices={"embed_tokens": SOME_TOKENS}
        ),
    ),
    "rows and factors of the head": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoraConfig(
            target_modules=["q_proj"], trainable_token_indices={"lm_head": SOME_TOKENS}
        ),
        peft.LoraConfig(target_modules=["lm_head"]),
    ),
    "masked weight": (
        peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["q_proj", "down_proj"]),
        peft.HiraConfig(r=3, target_modules=["q_proj", "down_proj"]),
        peft.LoraConfig(target_modules=["down_proj"]),
    ),
}


@dataclass(frozen=True)
class Served:
    plan: AdapterPlan
    tuned: peft.PeftModel


@pytest.fixture(scope="module", params=[False, True], ids=["", "biased base"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_llama(bias=request.param)


@pytest.fixture(scope="module")
def served(
    model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Served]:
    return {
        name: _trained(model, config, tmp_path_factory.mktemp("adapter"))
        for name, config in CONFIGS.items()
    }


@pytest.fixture(
    scope="module",
    params=[True, pytest.param(False, marks=pytest.mark.nightly)],
    ids=["fused", "unfused"],
)
def engine(model: PreTrainedModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running_engine(model, fuse=request.param, adapter_memory_bytes=32 << 20) as engine:
        yield engine


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _trained(model: PreTrainedModel, config: peft.PeftConfig, path: Path) -> Served:
    with _quiet_peft():
        tuned = peft.get_peft_model(untouched(model), config)
        randomise(tuned, std=0.3)
        tuned.eval()
        tuned.save_pretrained(path)
    return Served(_from_file(read_path(path, model).plan), tuned)


def _from_file(plan: AdapterPlan) -> AdapterPlan:
    """As the store reads it back."""
    data = bytearray(b"".join(pack_plan(plan).chunks))
    return parse_plan(torch.frombuffer(data, dtype=torch.uint8).clone())


def _prompts(n: int, seed: int = 3) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (4 + i % 5,), generator=g).tolist() for i in range(n)]


def _check(prompt: list[int], answer: Answer, oracle: Callable[..., Any], what: str) -> None:
    assert answer.last.error is None, what
    tokens = prompt + answer.generated
    with torch.inference_mode(), _quiet_peft():
        want = torch.log_softmax(oracle(input_ids=torch.tensor([tokens])).logits[0], dim=-1)
    assert answer.generated == want[len(prompt) - 1 : -1].argmax(dim=-1).tolist(), what
    expected = want[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
    assert float((_logprobs(answer) - expected).abs().max()) <= TOLERANCE, what


def _logprobs(answer: Answer) -> Tensor:
    """Of all tokens but the first."""
    given = [lp for lp in answer.events[0].prompt_logprobs if lp is not None]
    given += [lp for event in answer.events for lp in event.logprobs]
    return torch.tensor([lp.logprob for lp in given])


def test_every_operator_answers_as_peft_does_in_one_batch_with_all_others(
    model: PreTrainedModel, engine: Engine, served: Mapping[str, Served]
) -> None:
    names = ["base", *served, *reversed(served), "base"]
    prompts = _prompts(len(names))
    plans = [None if name == "base" else served[name].plan for name in names]
    answers = generate_all(engine, prompts, GREEDY, plans)
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        _check(prompt, answer, model if name == "base" else served[name].tuned, name)


@pytest.mark.skipif(not native.available(), reason="sums of PyTorch depend on the batch")
def test_rows_of_others_keep_their_bits_beside_operators(
    engine: Engine, served: Mapping[str, Served]
) -> None:
    plans = [None, served["plain"].plan]
    prompts = _prompts(2, seed=7)
    alone = generate_all(engine, prompts, GREEDY, plans)
    others = [one.plan for name, one in served.items() if name != "plain"]
    crowd = generate_all(engine, [*prompts, *_prompts(len(others))], GREEDY, [*plans, *others])
    for before, after in zip(alone, crowd, strict=False):
        assert before.token_ids == after.token_ids
        assert torch.equal(_logprobs(before), _logprobs(after))


def test_deltas_mix_with_each_other_and_with_low_rank_factors(
    model: PreTrainedModel, engine: Engine, served: Mapping[str, Served]
) -> None:
    kinds = {"Kronecker": 0.5, "SparseDelta": -0.7, "MaskedWeight": 0.4, "plain": 0.3}
    kinds |= {"Circulant": 1.5, "FourierDelta": 0.25, "DenseDelta": 0.2}
    _check_mixture(model, engine, [(served[name], weight) for name, weight in kinds.items()])


@pytest.mark.parametrize("what", ON_ONE_WEIGHT)
def test_a_weight_of_its_own_mixes_with_what_changes_the_base_there(
    what: str, model: PreTrainedModel, engine: Engine, tmp_path: Path
) -> None:
    weights = (0.7, -0.4, 0.5)
    parts = [
        (_trained(model, config, tmp_path / str(index)), weights[index])
        for index, config in enumerate(ON_ONE_WEIGHT[what])
    ]
    _check_mixture(model, engine, parts)
    _check_mixture(model, engine, parts[::-1])


def _check_mixture(
    model: PreTrainedModel, engine: Engine, parts: Sequence[tuple[Served, float]]
) -> None:
    plans = [(one.plan, weight) for one, weight in parts]
    digest = mixture_digest([(plan.digest, weight) for plan, weight in plans])
    mixture = _from_file(
        mix_plans(plans, BaseSpec.of(model, "tiny"), digest, [plan.digest for plan, _ in plans])
    )
    mixed = untouched(model)
    for one, weight in parts:
        with _quiet_peft():
            tuned = untouched(one.tuned).merge_and_unload()
        _add_difference(mixed, model, tuned, weight)
    prompts = _prompts(3)
    for prompt, answer in zip(
        prompts, generate_all(engine, prompts, GREEDY, [mixture] * 3), strict=True
    ):
        _check(prompt, answer, mixed, "mixture")


def _add_difference(
    mixed: PreTrainedModel, model: PreTrainedModel, tuned: PreTrainedModel, weight: float
) -> None:
    own, base = dict(tuned.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            parameter += weight * (own[name] - base[name])


@pytest.mark.parametrize("name", ["BlockRotation", "ButterflyRotation", "PairRotation"])
def test_rotations_do_not_mix(
    name: str, model: PreTrainedModel, served: Mapping[str, Served]
) -> None:
    plan = served[name].plan
    with pytest.raises(InvalidSelector, match="cannot be added up"):
        mix_plans([(plan, 0.5)], BaseSpec.of(model, "tiny"), "d" * 64, ["x"])


def test_the_report_says_that_rows_take_longer(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "oft"
    tuned = peft.get_peft_model(untouched(model), CONFIGS["BlockRotation"])
    randomise(tuned)
    tuned.save_pretrained(path)
    notes = read_path(path, model).report.notes
    assert any("own rows in torch" in note for note in notes), notes


def test_operators_are_as_close_in_bfloat16_as_low_rank_factors_are(
    model: PreTrainedModel, served: Mapping[str, Served]
) -> None:
    names = [*served, "plain"]
    prompts = _prompts(len(names))
    plans = [served[name].plan for name in names]
    with running_engine(untouched(model).to(torch.bfloat16), adapter_memory_bytes=32 << 20) as half:
        answers = generate_all(half, prompts, GREEDY, plans)
    errors = {}
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        assert answer.last.error is None, name
        tokens = torch.tensor([prompt + answer.generated])
        with torch.inference_mode(), _quiet_peft():
            want = torch.log_softmax(served[name].tuned(input_ids=tokens).logits[0], dim=-1)
        expected = want[:-1].gather(1, tokens[0, 1:].unsqueeze(1)).squeeze(1)
        errors[name] = float((_logprobs(answer) - expected).abs().max())
    assert max(errors.values()) <= 0.15, errors
