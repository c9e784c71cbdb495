"""Experts and scales of inputs in recorded steps answer as in free ones, in the one forward.

What free steps answer is held against other code in ``test_routed_experts.py``.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from loraplex_adapter_store.plan import AdapterPlan, RoutingStrategy
from loraplex_kernels.layout import LoraTarget
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.routers import MAX_CHOICES, MAX_EXPERTS, route_by_slot
from loraplex_router.experts import PlacedExperts, route
from loraplex_server.engine.sampling_params import SamplingParams
from loraplex_server.engine.slot_tables import SlotTables
from tests.support.architectures import tiny_model
from tests.support.engines import Answer, generate_all, running_engine
from tests.support.rerun import Rerun, engine_with, replays
from tests.support.routed_plans import (
    lora_plan,
    mixdora_plan,
    mixlora_plan,
    projection_plan,
    scaled_plan,
    scaled_slices_plan,
)

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
SCALED_LORA = scaled_plan(MODEL, seed=9, rank=3)
SLICES = scaled_slices_plan(MODEL, seed=11)
SLICES_LORA = scaled_slices_plan(MODEL, seed=12, rank=3)
MIXDORA = mixdora_plan(MODEL, n_experts=3, top_k=2, rank=2, seed=13)
MANY = mixlora_plan(MODEL, n_experts=MAX_EXPERTS, top_k=3, rank=1, seed=14)


def _gates_only(seed: int) -> AdapterPlan:
    """As of a MixLoRA on attention only: its gates still scale the MLP blocks."""
    plan = mixlora_plan(
        MODEL, n_experts=4, top_k=1, rank=3, seed=seed, strategy=RoutingStrategy.SWITCH
    )
    bare = {name: replace(e, experts=({},) * len(e.experts)) for name, e in plan.experts.items()}
    return replace(plan, experts=bare)


MIXTURES: dict[str, list[AdapterPlan | None]] = {
    "scales": [IA3, SCALED_LORA, None, LORA],
    "mixlora": [MIXLORA, None, LORA, MIXLORA],
    "top-p, switch and scales": [TOP_P, SWITCH, SCALED_LORA, None, IA3, LORA],
    "gates alone": [_gates_only(10), LORA, None],
    "mola": [MOLA, LORA, None, IA3],
    "loramoe and arrow": [LORAMOE, ARROW, None, SCALED_LORA],
    "all": [MIXLORA, MOLA, TOP_P, LORAMOE, SCALED_LORA, LORA, None],
    "scales of slices": [SLICES, SLICES_LORA, IA3, LORA, None],
    "downs of their own": [MIXDORA, MIXLORA, SCALED_LORA, LORA, None],
    "as many experts as there may be": [MANY, LORA, None],
    "all and what is rarest": [SLICES_LORA, MIXDORA, MOLA, MIXLORA, IA3, LORA, None],
}


def _tokens(answers: list[Answer]) -> list[list[int]]:
    assert [answer.last.error for answer in answers] == [None] * len(answers)
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_row_gets_what_it_gets_without_graphs(
    mixture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = MIXTURES[mixture]
    prompts = PROMPTS[: len(plans)]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        wanted = _tokens(generate_all(engine, prompts, GREEDY, plans))
    recorder = Rerun()
    with engine_with(recorder, MODEL, monkeypatch, max_loras=128) as engine:
        assert _tokens(generate_all(engine, prompts, GREEDY, plans)) == wanted
        # All steps are one replay, or one in pieces: no row took a second forward.
        assert replays(recorder, N_PIECES) == engine.stats().n_steps


def test_picks_are_counted_in_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Rerun()
    with engine_with(recorder, MODEL, monkeypatch, max_loras=128) as engine:
        _tokens(generate_all(engine, PROMPTS[:2], GREEDY, [MIXLORA, LORA]))
        assert replays(recorder, N_PIECES) == engine.stats().n_steps
        load = engine.experts.load(MIXLORA.digest, window_s=1e9)
    assert load is not None
    n_rows = len(PROMPTS[0]) + GREEDY.max_tokens - 1  # the last token is not run
    assert {sum(counts) for counts in load.counts.values()} == {2 * n_rows}
    assert set(load.counts) == set(MIXLORA.experts)


def test_a_slot_that_another_adapter_had_routes_and_scales_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine slots: each adapter drives the one before it out, and takes its first slot."""
    plans: list[AdapterPlan | None] = [MIXLORA, LORA, IA3, TOP_P, LORA, SWITCH, MIXLORA]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        wanted = [_tokens(generate_all(engine, PROMPTS[:1], GREEDY, [plan])) for plan in plans]
    recorder = Rerun()
    with engine_with(recorder, MODEL, monkeypatch, max_loras=9) as engine:
        found = [_tokens(generate_all(engine, PROMPTS[:1], GREEDY, [plan])) for plan in plans]
        assert engine.loop.adapters.n_evictions >= 4
        assert replays(recorder, N_PIECES) == engine.stats().n_steps
    assert found == wanted


def _too_many_experts() -> AdapterPlan:
    return mixlora_plan(MODEL, n_experts=MAX_EXPERTS + 1, top_k=2, rank=1, seed=20)


def _too_many_for_a_row() -> AdapterPlan:
    return projection_plan(
        MODEL, n_experts=MAX_CHOICES + 1, top_k=2, ranks=(2,), seed=21,
        strategy=RoutingStrategy.DENSE, leaves=("down_proj",),
    )  # fmt: skip


@pytest.mark.parametrize("odd", [_too_many_experts, _too_many_for_a_row])
def test_what_no_recorded_layer_does_takes_a_second_forward(
    odd: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(odd)
    plans = [odd(), MIXLORA, None]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        wanted = _tokens(generate_all(engine, PROMPTS[:3], GREEDY, plans))
    recorder = Rerun()
    with engine_with(recorder, MODEL, monkeypatch, max_loras=128) as engine:
        alone = _tokens(generate_all(engine, PROMPTS[:1], GREEDY, plans[:1]))
        assert recorder.n_replayed == 0
        generate_all(engine, PROMPTS[:3], GREEDY, plans)  # all adapters are there behind it
        before = replays(recorder, N_PIECES)
        assert _tokens(generate_all(engine, PROMPTS[:3], GREEDY, plans)) == wanted
        assert replays(recorder, N_PIECES) - before >= GREEDY.max_tokens  # of the others
    assert alone == wanted[:1]


def test_rows_beyond_the_sizes_of_their_kind_leave_the_others_their_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex_server.engine.recorded_sizes.MAX_PAIRS", 2 * MAX_CHOICES)
    plans = [MIXLORA, LORA, None, LORA]
    with running_engine(MODEL, max_batch_size=11, max_loras=128) as engine:
        wanted = _tokens(generate_all(engine, PROMPTS[:4], GREEDY, plans))
    recorder = Rerun()
    with engine_with(recorder, MODEL, monkeypatch, max_loras=128) as engine:
        generate_all(engine, PROMPTS[:4], GREEDY, plans)
        before = replays(recorder, N_PIECES)
        assert _tokens(generate_all(engine, PROMPTS[:4], GREEDY, plans)) == wanted
        assert replays(recorder, N_PIECES) - before >= GREEDY.max_tokens


@pytest.mark.parametrize("strategy", list(RoutingStrategy))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_as_data_choose_what_the_gates_do(
    strategy: RoutingStrategy, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    width, n_experts = 48, 6
    pool = LoraPool([LoraTarget("t", width, (8,))], n_bytes=1 << 16, n_slots=20, dtype=dtype)
    gate = torch.randn(n_experts, width, generator=generator)
    reserved = pool.reserve_tensors([(torch.empty(5), dtype), (gate, torch.float32)])
    reserved.tensors[1].copy_(gate)
    tables = SlotTables(pool, ["layers.0.mlp", "layers.0.mlp.down_proj"], [])
    placed = PlacedExperts(
        gate=reserved.tensors[1],
        slots=torch.arange(5, 5 + n_experts, dtype=torch.int32),
        strategy=strategy,
        top_k=3,
        top_p=0.6,
        load=torch.zeros(n_experts, dtype=torch.int64),
    )
    x = torch.randn(9, width, generator=generator).to(dtype)
    row_slots = torch.full((9,), 4, dtype=torch.int32)
    row_slots[3] = -1
    assert set(tables.routers(of_projections=False)) == {"layers.0.mlp"}
    table = tables.routers(of_projections=True)["layers.0.mlp"]
    known = tables.write(tuple(range(4, 5 + n_experts)), {"layers.0.mlp": placed}, {})
    slots, weights = route_by_slot(x, row_slots, pool.storage, table)
    rows = row_slots >= 0
    index, wanted = route(x[rows], gate, strategy, top_k=3, top_p=0.6)
    k = index.shape[1]
    assert torch.equal(slots[rows, :k], torch.where(index >= 0, index + 5, -1))
    torch.testing.assert_close(weights[rows, :k], wanted)
    assert not weights[rows, k:].any()
    assert slots[3].tolist() == [-1] * MAX_CHOICES
    counts = torch.bincount(index[index >= 0].flatten(), minlength=n_experts)
    assert torch.equal(known["layers.0.mlp"].load, counts)
    tables.clear((4,))
    slots, _ = route_by_slot(x, row_slots, pool.storage, table, takes_plain=True)
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
