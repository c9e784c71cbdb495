"""Experts of MLP blocks in captured steps answer as in eager ones, in the one forward.

What free steps answer is held against other code in ``test_routed_experts.py``.
"""

import copy
from dataclasses import replace

import pytest
import torch

from loraplex_adapter_store.plan import AdapterPlan, RoutingStrategy
from loraplex_kernels.formats.gate_table import MAX_CHOICES, MAX_EXPERTS
from loraplex_kernels.formats.layout import LoraTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.routed_mlp import route_by_slot
from loraplex_router.experts.expansion import PlacedExperts
from loraplex_router.experts.gates import route
from loraplex_server.engine.adapters.gate_tables import GateTables
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.routed_plans import (
    lora_plan,
    mixdora_plan,
    mixlora_plan,
    projection_plan,
    scaled_plan,
    scaled_slices_plan,
)
from tests.support.bases.architectures import tiny_model
from tests.support.gpu.rerun import Rerun, engine_with, replays
from tests.support.servers.engines import Answer, generate_all, running_engine

PROMPTS = [[5, 9, 200, 31, 7], [17], list(range(40, 80)), [3, 3, 3], [250, 1, 2], [9, 8], [77] * 9]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
MODEL = tiny_model("llama")
N_PIECES = MODEL.config.num_hidden_layers + 1
LORA = lora_plan(MODEL, rank=4, seed=1)
MIXLORA = mixlora_plan(MODEL, n_experts=8, top_k=2, rank=4, seed=2)
MOLA = projection_plan(MODEL, n_experts=3, top_k=2, ranks=(2, 5), seed=3)
TOP_P = mixlora_plan(MODEL, n_experts=4, top_k=2, rank=3, seed=4, strategy=RoutingStrategy.TOP_P)
SWITCH = mixlora_plan(MODEL, n_experts=4, top_k=1, rank=3, seed=5, strategy=RoutingStrategy.SWITCH)
LORAMOE = projection_plan(
    MODEL, n_experts=4, top_k=4, ranks=(3,), seed=6, strategy=RoutingStrategy.DENSE,
    leaves=("gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
ARROW = projection_plan(
    MODEL, n_experts=3, top_k=2, ranks=(4,), seed=7, strategy=RoutingStrategy.ARROW
)
IA3 = scaled_plan(MODEL, seed=8)
SLICES_LORA = scaled_slices_plan(MODEL, seed=12, rank=3)
MIXDORA = mixdora_plan(MODEL, n_experts=3, top_k=2, rank=2, seed=13)
MANY = mixlora_plan(MODEL, n_experts=MAX_EXPERTS, top_k=3, rank=1, seed=14)


def _gates_only(seed: int) -> AdapterPlan:
    """As of a MixLoRA on attention only: its gates still scale the MLP blocks."""
    plan = mixlora_plan(MODEL, n_experts=4, top_k=2, rank=3, seed=seed)
    bare = {name: replace(e, experts=({},) * len(e.experts)) for name, e in plan.experts.items()}
    return replace(plan, experts=bare)


MIXTURES: dict[str, list[AdapterPlan | None]] = {
    "mixlora": [MIXLORA, None, LORA, MIXLORA],
    "gates alone": [_gates_only(10), LORA, None],
    "as many experts as there may be": [MANY, LORA, MIXLORA, None],
}


def _tokens(answers: list[Answer]) -> list[list[int]]:
    assert [answer.last.error for answer in answers] == [None] * len(answers)
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_row_gets_what_it_gets_without_graphs(mixture: str) -> None:
    plans = MIXTURES[mixture]
    prompts = PROMPTS[: len(plans)]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        wanted = _tokens(generate_all(engine, prompts, GREEDY, plans))
    capture = Rerun()
    with engine_with(capture, MODEL, max_loras=128) as engine:
        assert _tokens(generate_all(engine, prompts, GREEDY, plans)) == wanted
        # All steps are one replay, or one in pieces: no row took a second forward.
        assert replays(capture, N_PIECES) == engine.stats().n_steps


def test_picks_are_counted_in_captured_steps() -> None:
    capture = Rerun()
    with engine_with(capture, MODEL, max_loras=128) as engine:
        _tokens(generate_all(engine, PROMPTS[:2], GREEDY, [MIXLORA, LORA]))
        assert replays(capture, N_PIECES) == engine.stats().n_steps
        load = engine.experts.load(MIXLORA.digest, window_s=1e9)
    assert load is not None
    n_rows = len(PROMPTS[0]) + GREEDY.max_tokens - 1  # the last token is not run
    assert {sum(counts) for counts in load.counts.values()} == {2 * n_rows}
    assert set(load.counts) == set(MIXLORA.experts)


def test_a_slot_that_another_adapter_had_routes_nothing_more() -> None:
    """Nine slots: each adapter drives the one before it out, and takes its first slot."""
    other = mixlora_plan(MODEL, n_experts=4, top_k=2, rank=3, seed=15)
    plans: list[AdapterPlan | None] = [MIXLORA, LORA, other, LORA, MIXLORA]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        expected = [_tokens(generate_all(engine, PROMPTS[:1], GREEDY, [plan])) for plan in plans]
    capture = Rerun()
    with engine_with(capture, MODEL, max_loras=9) as engine:
        answers = [_tokens(generate_all(engine, PROMPTS[:1], GREEDY, [plan])) for plan in plans]
        assert engine.loop.adapters.n_evictions >= 3
        assert replays(capture, N_PIECES) == engine.stats().n_steps
    assert answers == expected


EAGER = {
    "IA3": IA3,
    "scales of slices": SLICES_LORA,
    "mixdora": MIXDORA,
    "mola": MOLA,
    "loramoe": LORAMOE,
    "arrow": ARROW,
    "mixlora-dynamic": TOP_P,
    "mixlora-switch": SWITCH,
    "too many experts": mixlora_plan(MODEL, n_experts=MAX_EXPERTS + 1, top_k=2, rank=1, seed=20),
    "too many for a row": mixlora_plan(MODEL, n_experts=10, top_k=MAX_CHOICES + 1, rank=1, seed=21),
}


@pytest.mark.parametrize("family", EAGER)
def test_what_no_captured_layer_computes_takes_a_second_forward(family: str) -> None:
    plans = [EAGER[family], MIXLORA, None]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        expected = _tokens(generate_all(engine, PROMPTS[:3], GREEDY, plans))
    capture = Rerun()
    with engine_with(capture, MODEL, max_loras=128) as engine:
        alone = _tokens(generate_all(engine, PROMPTS[:1], GREEDY, plans[:1]))
        assert capture.n_replayed == 0
        generate_all(engine, PROMPTS[:3], GREEDY, plans)  # all adapters are resident afterwards
        before = replays(capture, N_PIECES)
        assert _tokens(generate_all(engine, PROMPTS[:3], GREEDY, plans)) == expected
        assert replays(capture, N_PIECES) - before >= GREEDY.max_tokens  # of the other rows
    assert alone == expected[:1]


def test_rows_beyond_the_sizes_of_their_kind_leave_the_others_their_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex_server.engine.steps.captured_sizes.MAX_PAIRS", 2 * MAX_CHOICES)
    plans = [MIXLORA, LORA, None, LORA]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        wanted = _tokens(generate_all(engine, PROMPTS[:4], GREEDY, plans))
    capture = Rerun()
    with engine_with(capture, MODEL, max_loras=128) as engine:
        generate_all(engine, PROMPTS[:4], GREEDY, plans)
        before = replays(capture, N_PIECES)
        assert _tokens(generate_all(engine, PROMPTS[:4], GREEDY, plans)) == wanted
        assert replays(capture, N_PIECES) - before >= GREEDY.max_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_as_data_choose_what_the_gates_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    width, n_experts = 48, 6
    pool = LoraPool([LoraTarget("t", width, (8,))], n_bytes=1 << 16, n_slots=20, dtype=dtype)
    gate = torch.randn(n_experts, width, generator=generator)
    reserved = pool.reserve_tensors([(torch.empty(5), dtype), (gate, torch.float32)])
    reserved.tensors[1].copy_(gate)
    tables = GateTables(pool, ["layers.0.mlp"])
    placed = PlacedExperts(
        gate=reserved.tensors[1],
        slots=torch.arange(5, 5 + n_experts, dtype=torch.int32),
        strategy=RoutingStrategy.TOP_K,
        top_k=3,
        top_p=0.6,
        load=torch.zeros(n_experts, dtype=torch.int64),
    )
    x = torch.randn(9, width, generator=generator).to(dtype)
    row_slots = torch.full((9,), 4, dtype=torch.int32)
    row_slots[3] = -1
    table = tables.by_block()["layers.0.mlp"]
    known = tables.write(tuple(range(4, 5 + n_experts)), {"layers.0.mlp": placed})
    slots, weights = route_by_slot(x, row_slots, pool.storage, table)
    rows = row_slots >= 0
    index, expected = route(x[rows], gate, RoutingStrategy.TOP_K, top_k=3, top_p=0.6)
    assert torch.equal(slots[rows, :3], index + 5)
    torch.testing.assert_close(weights[rows, :3], expected)
    assert not weights[rows, 3:].any()
    assert slots[3].tolist() == [-1] * MAX_CHOICES
    counts = torch.bincount(index.flatten(), minlength=n_experts)
    assert torch.equal(known["layers.0.mlp"].load, counts)
    tables.clear(4)
    slots, _ = route_by_slot(x, row_slots, pool.storage, table)
    assert slots[rows][:, 0].tolist() == [4] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixture", MIXTURES)
def test_on_a_gpu_replays_give_the_tokens_of_free_steps(mixture: str) -> None:
    """In float32, where the two ways to sum over experts choose the same tokens."""
    plans = MIXTURES[mixture]
    on_gpu = copy.deepcopy(MODEL).to("cuda", torch.float32)
    answers = []
    for cuda_graphs in (False, True):
        with running_engine(
            on_gpu, max_batch_size=11, max_loras=128, cuda_graphs=cuda_graphs
        ) as engine:
            assert (engine.loop.runner._graphs is not None) is cuda_graphs
            answers.append(_tokens(generate_all(engine, PROMPTS[: len(plans)], GREEDY, plans)))
    assert answers[0] == answers[1]
