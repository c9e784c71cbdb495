"""Mixed steps against the naive loop, float32, through the kernels' reference operator."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_kernels.formats.layout import NO_PAGE, PAGE_RANK, LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.lora.experts import Linear, moe_down, moe_gate_up
from loraplex_kernels.reference.lora import lora_apply_reference
from loraplex_router.experts.expansion import (
    PlacedExperts,
    RoutedRows,
    expand,
    expand_by_slots,
    projection_segments,
    projection_segments_by_slots,
)
from loraplex_router.experts.gates import experts_per_row
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.layers.routed import RoutedMlp
from tests.support.adapters.experts_oracle import (
    LowRank,
    OracleAdapter,
    OracleExpert,
    adapter_mlp,
    gate_weights,
)

HIDDEN, FF = 24, 40


class PoolBuilder:
    """Packs factors into the paged storage that the operator reads."""

    def __init__(self, target: LoraTarget) -> None:
        self.target = target
        self.parts: list[Tensor] = []
        self.n_elements = 0
        self.ranks: list[list[int]] = []
        self.a: list[list[list[int]]] = []
        self.b: list[list[list[int]]] = []

    def add(self, slices: Sequence[LowRank | None]) -> None:
        ranks, a_pages, b_pages = [], [], []
        for factors in slices:
            rank = 0 if factors is None else factors[1].shape[0]
            ranks.append(rank)
            a_pages.append([] if factors is None else self._pages(factors[1]))
            b_pages.append([] if factors is None else self._pages(factors[0].T))
        self.ranks.append(ranks)
        self.a.append(a_pages)
        self.b.append(b_pages)

    def _pages(self, rows: Tensor) -> list[int]:
        offsets = []
        for part in rows.split(PAGE_RANK):
            offsets.append(self.n_elements)
            self.parts.append(part.reshape(-1))
            self.n_elements += part.numel()
        return offsets

    def build(self) -> LoraTables:
        def padded(pages: list[list[list[int]]]) -> Tensor:
            width = max((len(p) for slot in pages for p in slot), default=1) or 1
            return torch.tensor(
                [[p + [NO_PAGE] * (width - len(p)) for p in slot] for slot in pages]
            )

        none = torch.full((len(self.ranks), self.target.n_slices), NO_PAGE, dtype=torch.int64)
        return LoraTables(
            self.target,
            torch.cat([*self.parts, torch.zeros(1)]),
            torch.tensor(self.ranks, dtype=torch.int32),
            padded(self.a),
            padded(self.b),
            none,
            none,
        )


@dataclass
class BoundOp:
    tables: LoraTables

    def __call__(self, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        lora_apply_reference(x, self.tables, segments, out=out)

    def moe_gate_up(self, packed: Linear, *args: Any) -> tuple[Tensor, Tensor]:
        return moe_gate_up(packed, self, *args)

    def moe_down(self, packed: Linear, *args: Any) -> Tensor:
        return moe_down(packed, self, *args)


def random_factors(out: int, rank: int, width: int) -> LowRank | None:
    return None if rank == 0 else (torch.randn(out, rank) * 0.3, torch.randn(rank, width) * 0.3)


def random_expert(gate: int, up: int, down: int) -> OracleExpert:
    return OracleExpert(
        random_factors(FF, gate, HIDDEN),
        random_factors(FF, up, HIDDEN),
        random_factors(HIDDEN, down, FF),
    )


def mixlora(n_experts: int, top_k: int, rank: int, strategy: str = "mixlora") -> OracleAdapter:
    return OracleAdapter(
        experts=[random_expert(rank, rank, rank) for _ in range(n_experts)],
        gate=torch.randn(n_experts, HIDDEN),
        strategy=strategy,
        top_k=top_k,
    )


def activation(gate_up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate_up[:, :FF]) * gate_up[:, FF:]


@dataclass
class StepLinear:
    """The parts of ``PackedLoraLinear`` that an MLP block uses."""

    weight: Tensor
    lora: BoundOp
    plain: LoraSegments | None
    reduce: None = None

    def packed(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def scaled_inputs(self, x: Tensor) -> Tensor:
        return x

    def add_step_adapters(self, x: Tensor, out: Tensor) -> None:
        if self.plain is not None:
            self.lora(x, self.plain, out)

    @property
    def bound(self) -> BoundOp:
        return self.lora


class MixedStep:
    """Places adapters into one pool and describes which rows carry which."""

    def __init__(self, adapters: Sequence[OracleAdapter | None], row_adapter: list[int]) -> None:
        self.adapters, self.row_adapter = adapters, row_adapter
        self.weights = (
            torch.randn(FF, HIDDEN) * 0.2,
            torch.randn(FF, HIDDEN) * 0.2,
            torch.randn(HIDDEN, FF) * 0.2,
        )
        self.hidden = torch.randn(len(row_adapter), HIDDEN)
        gate_up = PoolBuilder(LoraTarget("gate_up", HIDDEN, (FF, FF)))
        down = PoolBuilder(LoraTarget("down", FF, (HIDDEN,)))
        self.slots: list[list[int]] = []
        n_slots = 0
        for adapter in adapters:
            sets = [] if adapter is None else (adapter.experts or [adapter.plain])
            self.slots.append(list(range(n_slots, n_slots + len(sets))))
            n_slots += len(sets)
            for e in sets:
                gate_up.add((e.gate, e.up))
                down.add((e.down,))
        lora_gate_up, lora_down = BoundOp(gate_up.build()), BoundOp(down.build())
        self.gate_up = StepLinear(torch.cat(self.weights[:2]), lora_gate_up, self.plain())
        self.down = StepLinear(self.weights[2], lora_down, self.plain())

    def rows_of(self, index: int) -> list[int]:
        return [row for row, a in enumerate(self.row_adapter) if a == index]

    def plain(self) -> LoraSegments | None:
        slots, indptr, rows = [], [0], []
        for index, adapter in enumerate(self.adapters):
            if adapter is not None and adapter.gate is None and self.rows_of(index):
                slots.append(self.slots[index][0])
                rows += self.rows_of(index)
                indptr.append(len(rows))
        if not slots:
            return None
        return LoraSegments(
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(indptr, dtype=torch.int32),
            torch.tensor(rows, dtype=torch.int32),
        )

    def routed(self, *, shared_down: bool = True) -> list[RoutedRows]:
        result = []
        for index, adapter in enumerate(self.adapters):
            if adapter is None or adapter.gate is None or not self.rows_of(index):
                continue
            strategy = RoutingStrategy(adapter.strategy)
            n_experts = len(adapter.experts)
            rows = torch.tensor(self.rows_of(index))
            k = experts_per_row(strategy, n_experts, adapter.top_k)
            result.append(
                RoutedRows(
                    rows=rows,
                    pair_rows=RoutedRows.pair_rows_of(rows, k),
                    experts=PlacedExperts(
                        gate=adapter.gate,
                        slots=torch.tensor(self.slots[index], dtype=torch.int32),
                        strategy=strategy,
                        top_k=adapter.top_k,
                        top_p=adapter.top_p,
                        shared_down=shared_down,
                        load=torch.zeros(n_experts, dtype=torch.int64),
                    ),
                )
            )
        return result

    def run(self, *, shared_down: bool = True) -> Tensor:
        step = ForwardContext(routed={"mlp": tuple(self.routed(shared_down=shared_down))})
        linears: Any = self.gate_up, self.down
        return RoutedMlp("mlp", *linears, activation, step).run(self.hidden.clone())

    def want(self) -> Tensor:
        rows = [
            adapter_mlp(self.hidden[row], self.weights, self.adapters[a])
            for row, a in enumerate(self.row_adapter)
        ]
        return torch.stack(rows)


def crowd() -> list[OracleAdapter | None]:
    return [
        None,
        OracleAdapter(plain=random_expert(8, 0, 20)),
        OracleAdapter(plain=random_expert(3, 17, 2)),
        mixlora(8, 2, 16),
        mixlora(3, 1, 5),
        mixlora(4, 2, 4, "mixlora-dynamic"),
        mixlora(5, 1, 2, "mixlora-switch"),
        mixlora(6, 6, 3),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_step_that_mixes_everything_equals_the_naive_loop(seed: int) -> None:
    torch.manual_seed(seed)
    adapters = crowd()
    step = MixedStep(adapters, torch.randint(len(adapters), (29,)).tolist())
    torch.testing.assert_close(step.run(), step.want(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("index", range(3, 8))
def test_a_step_of_one_kind_alone_equals_the_naive_loop(index: int) -> None:
    torch.manual_seed(index)
    step = MixedStep(crowd(), [index] * 7)
    torch.testing.assert_close(step.run(), step.want(), atol=1e-4, rtol=0)


def test_one_row_alone_gets_what_it_gets_in_a_crowd() -> None:
    torch.manual_seed(1)
    adapters = crowd()
    crowded = MixedStep(adapters, [3, 0, 1, 3, 5, 6, 3, 2])
    together = crowded.run()
    crowded.row_adapter, crowded.hidden = [3], crowded.hidden[6:7]
    torch.testing.assert_close(crowded.run()[0], together[6], atol=1e-5, rtol=0)


def test_a_separate_down_product_per_expert_gives_the_same() -> None:
    """The path of experts that scale their output; without a scale both must agree."""
    torch.manual_seed(2)
    step = MixedStep(crowd(), [3, 3, 0, 1, 5, 5, 4])
    torch.testing.assert_close(step.run(shared_down=False), step.run(), atol=1e-5, rtol=0)


def test_experts_missing_a_projection_leave_it_to_the_base() -> None:
    torch.manual_seed(3)
    adapter = mixlora(4, 2, 4)
    adapter.experts = [
        random_expert(*ranks) for ranks in [(4, 0, 0), (0, 4, 0), (0, 0, 4), (0, 0, 0)]
    ]
    step = MixedStep([adapter], [0] * 9)
    torch.testing.assert_close(step.run(), step.want(), atol=1e-4, rtol=0)


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(4)
    step = MixedStep(crowd(), [3, 4, 5, 6, 7, 3, 0, 1])
    assert torch.equal(step.run(), step.run())


def test_segments_hold_each_pair_once_with_ascending_rows() -> None:
    torch.manual_seed(5)
    step = MixedStep(crowd(), [3, 5, 3, 4, 3, 0, 5])
    pairs = expand(step.hidden, step.routed())
    indptr = pairs.segments.indptr.tolist()
    assert indptr[0] == 0
    assert indptr[-1] == len(pairs.segments.indices)
    assert sorted(pairs.segments.indices.tolist()) == list(range(indptr[-1]))
    assert pairs.segments.slots[-1] == -1
    for first, last in itertools.pairwise(indptr):
        rows = pairs.segments.indices[first:last].tolist()
        assert rows == sorted(rows)


def test_expert_load_counts_every_routed_row_k_times() -> None:
    torch.manual_seed(6)
    step = MixedStep(crowd(), [3, 4, 3, 0, 3])
    routed = step.routed()
    expand(step.hidden, routed)
    loads = [r.experts.load for r in routed]
    assert [int(load.sum()) for load in loads if load is not None] == [6, 1]


def _members(segments: LoraSegments) -> list[tuple[int, int, float]]:
    """(slot, row, weight) of every pair that has an adapter, in order of the segments."""
    assert segments.weights is not None
    found = []
    for slot, (first, last) in zip(
        segments.slots.tolist(), itertools.pairwise(segments.indptr.tolist()), strict=True
    ):
        rows = segments.indices[first:last].tolist()
        weights = segments.weights[first:last].tolist()
        found += [(slot, *pair) for pair in zip(rows, weights, strict=True) if slot >= 0]
    return found


@pytest.mark.parametrize("users", [[3, 5, 3, 4, 3, 0, 5], [3, 3], [1, 4, 5, 5]])
def test_grouped_by_slot_pairs_and_counts_are_the_same(users: list[int]) -> None:
    """As a GPU groups them, without a look at the data."""
    torch.manual_seed(8)
    step = MixedStep(crowd(), users)
    routed, again = step.routed(), step.routed()
    wanted, found = expand(step.hidden, routed), expand_by_slots(step.hidden, again)
    assert sorted(_members(found.segments)) == sorted(_members(wanted.segments))
    assert [slot for slot, *_ in _members(found.segments)] == sorted(
        slot for slot, *_ in _members(wanted.segments)
    )
    for mine, theirs in zip(found.weights, wanted.weights, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(again, routed, strict=True):
        assert mine.experts.load is not theirs.experts.load
        assert torch.equal(mine.experts.load, theirs.experts.load)
    rows = projection_segments(step.hidden, routed)
    by_slot = projection_segments_by_slots(step.hidden, again)
    assert sorted(_members(by_slot)) == sorted(_members(rows))


@pytest.mark.parametrize("strategy", ["mixlora", "loramoe", "arrow"])
def test_experts_of_one_projection_equal_the_naive_sum(strategy: str) -> None:
    """MoLA (top-k), LoRAMoE (dense) and Arrow: y += Σ w_e B_e A_e x."""
    torch.manual_seed(7)
    factors = [random_factors(HIDDEN, rank, FF) for rank in (2, 9, 20, 4)]
    builder = PoolBuilder(LoraTarget("down", FF, (HIDDEN,)))
    for f in factors:
        builder.add((f,))
    x, gate = torch.randn(6, FF), torch.randn(4, FF) * 0.3
    rows = torch.tensor([0, 2, 3, 5])
    kind = RoutingStrategy(strategy)
    routed = RoutedRows(
        rows=rows,
        pair_rows=RoutedRows.pair_rows_of(rows, experts_per_row(kind, 4, 2)),
        experts=PlacedExperts(
            gate=gate,
            slots=torch.arange(4, dtype=torch.int32),
            strategy=kind,
            top_k=2,
            top_p=0.0,
            load=torch.zeros(4, dtype=torch.int64),
        ),
    )
    out = torch.zeros(6, HIDDEN)
    segments = projection_segments(x, [routed])
    lora_apply_reference(x, builder.build(), segments, out=out)
    want = torch.zeros(6, HIDDEN)
    for row in rows.tolist():
        for e, w in gate_weights(gate @ x[row], strategy, 2, 0.0).items():
            b, a = factors[e]
            want[row] += w * (b @ (a @ x[row]))
    torch.testing.assert_close(out, want, atol=1e-4, rtol=0)
