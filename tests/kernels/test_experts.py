"""Routed experts' native operators against the PyTorch definition in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.formats.factors import SliceFactors
from loraplex_kernels.formats.layout import LoraSegments, LoraTarget
from loraplex_kernels.layers.gated_experts import GatedExperts
from loraplex_kernels.layers.model_ops import silu_mul
from loraplex_kernels.layers.packed_linear import PackedLinear
from loraplex_kernels.lora.experts import (
    StepPairs,
    group_pairs,
    moe_combine,
    moe_down,
    moe_gate_up,
    route_and_group,
    route_top_k,
    weighted_sum,
)
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.reference.lora import lora_apply_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler built the kernels")
HIDDEN, FF = 64, 96
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (1, 1), (6, 6), (13, 3)])
def test_routing_equals_float64_and_has_the_same_bits_alone(
    dtype: torch.dtype, n_experts: int, k: int
) -> None:
    torch.manual_seed(n_experts)
    hidden, gate = torch.randn(37, HIDDEN).to(dtype), torch.randn(n_experts, HIDDEN)
    index, weight = route_top_k(hidden, gate, k)
    values, order = (hidden.double() @ gate.double().T).sort(dim=1, descending=True)
    assert torch.equal(index.long(), order[:, :k])
    torch.testing.assert_close(weight.double(), values[:, :k].softmax(1), atol=1e-5, rtol=0)
    for row in (0, 20, 36):
        alone = route_top_k(hidden[row : row + 1], gate, k)
        assert torch.equal(alone[0][0], index[row])
        assert torch.equal(alone[1][0], weight[row])


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (1, 1), (6, 6)])
def test_gated_experts_equal_float64_and_have_the_same_bits_alone(
    dtype: torch.dtype, n_experts: int, k: int
) -> None:
    torch.manual_seed(n_experts)
    gate_up = (torch.randn(n_experts, 2 * FF, HIDDEN) / 8).to(dtype)
    down = (torch.randn(n_experts, HIDDEN, FF) / 10).to(dtype)
    products = [[PackedLinear([w], [None]) for w in stack] for stack in (gate_up, down)]
    assert GatedExperts.takes(*products)
    experts = GatedExperts(*products)
    x, weights = torch.randn(37, HIDDEN).to(dtype), torch.rand(37, k).to(dtype)
    index = torch.stack([torch.randperm(n_experts)[:k] for _ in range(37)])
    got = experts(x, index, weights)
    gate, up = torch.einsum("nd,nkfd->nkf", x.double(), gate_up[index].double()).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    y = torch.einsum("nkf,nkdf->nkd", inner, down[index].double())
    expected = (y * weights.double()[..., None]).sum(1)
    scale = float(expected.abs().max())
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(got.double(), expected, atol=tolerance * scale, rtol=0)
    for row in (0, 20, 36):
        one = slice(row, row + 1)
        assert torch.equal(experts(x[one], index[one], weights[one])[0], got[row])
    with pytest.raises(IndexError, match=f"experts are 0 to {n_experts - 1}"):
        experts(x[:1], torch.full((1, 1), n_experts), weights[:1, :1])


@pytest.mark.usefixtures("kernel_set")
def test_equal_logits_go_to_the_lower_expert() -> None:
    index, weight = route_top_k(torch.ones(2, HIDDEN), torch.ones(5, HIDDEN), 3)
    assert index.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(weight, torch.full((2, 3), 1 / 3))


def test_pairs_are_grouped_stably() -> None:
    torch.manual_seed(8)
    ids, weight = torch.randint(0, 9, (40,), dtype=torch.int32), torch.rand(40)
    grouped = group_pairs(ids, weight, 10)
    order = ids.sort(stable=True).indices
    assert torch.equal(grouped.indices.long(), order)
    assert torch.equal(grouped.weights, weight[order])
    assert grouped.indptr.tolist() == [0, *torch.bincount(ids, minlength=10).cumsum(0).tolist()]


def test_routing_and_grouping_at_once_equals_one_after_the_other() -> None:
    torch.manual_seed(9)
    hidden, gate = torch.randn(21, HIDDEN), torch.randn(8, HIDDEN)
    load = torch.full((8,), 5)
    weight, grouped = route_and_group(hidden, gate, 2, load)
    index, expected = route_top_k(hidden, gate, 2)
    apart = group_pairs(index.reshape(-1), expected.reshape(-1), 8)
    assert torch.equal(weight, expected)
    assert all(torch.equal(a, b) for a, b in zip(grouped, apart, strict=True))
    assert torch.equal(load, 5 + torch.bincount(index.reshape(-1), minlength=8))


class Problem:
    """Eight slots of assorted ranks, some without a slice or empty, over a gate-up and a down."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        targets = [LoraTarget("up", HIDDEN, (FF, FF)), LoraTarget("down", FF, (HIDDEN,))]
        self.pool = LoraPool(targets, n_bytes=1 << 22, n_slots=8, dtype=dtype)
        for ranks in ((16, 16), (3, 40), (8, 0), (0, 1), (0, 0), (16, 17), (64, 2), (5, 5)):
            factors = {
                "up": tuple(self._factors(r, HIDDEN, FF) for r in ranks),
                "down": (self._factors(ranks[1], FF, HIDDEN),),
            }
            slot = self.pool.reserve(self.pool.pack(factors))
            self.pool.fill(slot)
            self.pool.publish(slot)
        self.up = PackedLinear([_draw(dtype, FF, HIDDEN) for _ in range(2)], [None, None])
        self.down = PackedLinear([_draw(dtype, HIDDEN, FF)], [torch.randn(HIDDEN)])

    @staticmethod
    def _factors(rank: int, n_in: int, n_out: int) -> SliceFactors | None:
        if rank == 0:
            return None
        return SliceFactors(torch.randn(rank, n_in) / n_in**0.5, torch.randn(n_out, rank) / 4)

    def reference(self, target: str, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        tables = replace(self.pool.tables(target), storage=self.pool.storage.double())
        lora_apply_reference(x, tables, segments, out=out)


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def _double_linear(linear: PackedLinear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.double()
    return torch.nn.functional.linear(x, linear.matrix().double(), bias)


def _double_silu(gate_up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate_up[:, :FF]) * gate_up[:, FF:]


def _pairs(groups: list[tuple[list[int], int]]) -> StepPairs:
    made = tuple((torch.tensor(rows), k) for rows, k in groups)
    return StepPairs(torch.cat([rows.repeat_interleave(k) for rows, k in made]), made)


def _segments(ids: Tensor, weight: Tensor) -> LoraSegments:
    """By slot; a negative id is no expert."""
    grouped = group_pairs(torch.where(ids < 0, 8, ids).int(), weight, 9)
    slots = torch.tensor([*range(8), -1], dtype=torch.int32)
    return LoraSegments(slots, grouped.indptr, grouped.indices, grouped.weights)


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "ids"),
    [
        ([(list(range(16)), 2)], "any"),
        ([(list(range(16)), 2)], "one"),  # a single segment: cut into pieces
        ([([1], 2)], "any"),
        ([([0, 2, 5], 2), ([1, 7], 1), ([3, 4, 6, 9], 3)], "any"),
        ([(list(range(0, 200, 3)), 2)], "any"),
        ([([2, 3], 2)], "none"),
    ],
)
def test_spread_mix_and_gather_equal_float64(
    dtype: torch.dtype, groups: list[tuple[list[int], int]], ids: str
) -> None:
    problem, pairs = Problem(dtype), _pairs(groups)
    n_rows, n_pairs = 1 + int(pairs.rows.max()), pairs.rows.shape[0]
    x = _draw(dtype, n_rows, HIDDEN) * 4
    draw = {"any": torch.randint(-1, 8, (n_pairs,)), "one": torch.full((n_pairs,), 5)}
    weights = tuple(torch.rand(len(rows), k) for rows, k in groups)
    segments = _segments(
        draw.get(ids, torch.full((n_pairs,), -1)), torch.cat([w.reshape(-1) for w in weights])
    )
    up, down = PreparedTarget(problem.pool, "up"), PreparedTarget(problem.pool, "down")

    base, expert_act = up.moe_gate_up(problem.up, silu_mul, x, pairs, segments)
    act = silu_mul(base)
    moe_combine(expert_act, weights, pairs, act)
    out = down.moe_down(problem.down, act, expert_act, pairs, segments)

    exact = LoraSegments(
        segments.slots,
        segments.indptr,
        segments.indices,
        segments.weights.double(),  # type: ignore[union-attr]
    )
    want_base, want_expert_act = moe_gate_up(
        lambda h: _double_linear(problem.up, h),
        lambda *call: problem.reference("up", *call),
        _double_silu,
        x.double(),
        pairs,
        exact,
    )
    tolerance = 2e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(base.double(), want_base, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        expert_act.double(), want_expert_act, atol=4 * tolerance, rtol=tolerance
    )
    # From here on from what was really stored, so that each step is held to its own rounding.
    first = 0
    for (rows, k), weight in zip(pairs.groups, weights, strict=True):
        slots = expert_act[first : first + len(rows) * k].double().view(len(rows), k, FF)
        mixed = weighted_sum(slots, weight.double())
        torch.testing.assert_close(act[rows].double(), mixed, atol=tolerance, rtol=tolerance)
        first += len(rows) * k
    want = moe_down(
        lambda a: _double_linear(problem.down, a),
        lambda *call: problem.reference("down", *call),
        act.double(),
        expert_act.double(),
        pairs,
        exact,
    )
    torch.testing.assert_close(out.double(), want, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_routed_row_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    up, down = PreparedTarget(problem.pool, "up"), PreparedTarget(problem.pool, "down")
    x, ids = _draw(dtype, 16, HIDDEN), torch.randint(0, 8, (32,))
    weight = torch.rand(16, 2)

    def run(rows: list[int]) -> Tensor:
        pairs = _pairs([(list(range(len(rows))), 2)])
        mine = torch.tensor([2 * row + slot for row in rows for slot in (0, 1)])
        segments = _segments(ids[mine], weight[rows].reshape(-1))
        base, expert_act = up.moe_gate_up(problem.up, silu_mul, x[rows], pairs, segments)
        act = silu_mul(base)
        moe_combine(expert_act, (weight[rows],), pairs, act)
        return down.moe_down(problem.down, act, expert_act, pairs, segments)

    together = run(list(range(16)))
    assert torch.equal(run(list(range(16))), together)
    assert torch.equal(run([9, 3, 15, 0]), together[[9, 3, 15, 0]])
    for row in (0, 7, 15):
        assert torch.equal(run([row])[0], together[row])


def test_pairs_beyond_the_step_are_refused() -> None:
    problem = Problem(torch.float32)
    up = PreparedTarget(problem.pool, "up")
    pairs = StepPairs(torch.tensor([0, 5]), ((torch.tensor([0, 5]), 1),))
    segments = _segments(torch.tensor([0, 1]), torch.ones(2))
    with pytest.raises(IndexError, match="up: a pair stands on a row beyond x"):
        up.moe_gate_up(problem.up, silu_mul, torch.randn(2, HIDDEN), pairs, segments)
