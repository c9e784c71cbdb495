"""Gates and experts by slot equal their references, within rows alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex_kernels.formats.gate_table import GATE_WORDS, MAX_CHOICES, MAX_EXPERTS, GateTable
from loraplex_kernels.formats.layout import LoraTables
from loraplex_kernels.lora.routed_mlp import (
    RoutedPairs,
    add_pairs,
    gate_pairs,
    mix_pairs,
    route_by_slot,
)
from loraplex_kernels.lora.segments import build_segments, expand_routed
from loraplex_kernels.reference.lora import lora_apply_reference
from loraplex_kernels.triton.group_rows import build_device_segments
from loraplex_kernels.triton.launch_choices import ExpandChoice, ShrinkChoice
from loraplex_kernels.triton.moe import (
    add_pairs_triton,
    expand_gate,
    gate_pairs_triton,
    mix_pairs_triton,
)
from loraplex_kernels.triton.moe_gate import route_by_slot_triton
from loraplex_kernels.triton.shrink import lora_shrink, planes_shape
from tests.support.adapters.lora_problems import LoraProblem, make_problem, moved, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16_DAILY = [
    torch.bfloat16,
    *(pytest.param(dtype, marks=pytest.mark.nightly) for dtype in (torch.float32, torch.float16)),
]


class Gates(NamedTuple):
    storage: Tensor
    table: GateTable


def _gates(width: int, adapters: list[tuple[int, int] | None], dtype: torch.dtype) -> Gates:
    """Each adapter's (experts, k), in slots from 0: its own, then its experts'. The rest is NaN."""
    generator = torch.Generator().manual_seed(width)
    n_slots = sum(1 + (0 if one is None else one[0]) for one in adapters) + 1
    words = torch.full((n_slots, 3, GATE_WORDS), -1, dtype=torch.int64)
    parts, size, slot = [torch.full((16,), float("nan"))], 16, 0
    for one in adapters:
        if one is not None:
            n_experts, k = one
            gate = torch.randn(n_experts * width, generator=generator) * width**-0.5 * 2
            padding = torch.full((-gate.numel() % 16 + 16,), float("nan"))
            words[slot, 1] = torch.tensor([size, n_experts, slot + 1, k])
            parts += [gate, padding]
            size += gate.numel() + padding.numel()
            slot += n_experts
        slot += 1
    storage = torch.cat(parts).view(dtype)
    return Gates(storage, GateTable(words[:, 1], torch.zeros(n_slots, dtype=torch.int64)))


def _moved(table: GateTable, device: torch.device) -> GateTable:
    return GateTable(table.words.to(device), table.load.clone().to(device))


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Rows with 7 unused columns behind them that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, width, generator=generator)
    padded = torch.cat((values, torch.full((n, 7), torch.nan)), dim=1).to(dtype).to(device)
    return padded[:, :width]


def _route(
    x: Tensor, row_slots: Tensor, gates: Gates, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, weights, load; the outputs are not initialised before."""
    table = _moved(gates.table, device)
    slots = torch.full((x.shape[0], MAX_CHOICES), 12345, dtype=torch.int32, device=device)
    weights = torch.full((x.shape[0], MAX_CHOICES), torch.nan, device=device)
    storage, row_slots = gates.storage.to(device), row_slots.to(device)
    route_by_slot_triton(x, row_slots, storage, table, slots=slots, weights=weights)
    return slots.cpu(), weights.cpu(), table.load.cpu()


@settings(max_examples=8, deadline=None)
@given(
    adapters=st.lists(
        st.one_of(
            st.none(),
            st.tuples(
                st.one_of(st.integers(1, MAX_EXPERTS), st.sampled_from([16, 17, MAX_EXPERTS])),
                st.integers(1, MAX_CHOICES),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    width=st.sampled_from([41, 64, 300, 1111]),
    n_rows=st.integers(0, 13),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_gates_equal_the_reference(
    device: torch.device,
    adapters: list[tuple[int, int] | None],
    width: int,
    n_rows: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    gates = _gates(width, [one and (one[0], min(one)) for one in adapters], dtype)
    own, slot = [-1], 0
    for one in adapters:
        own.append(slot)
        slot += 1 + (0 if one is None else one[0])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(own), (n_rows,), generator=generator)
    row_slots = torch.tensor(own, dtype=torch.int32)[picks]
    x = _rows(n_rows, width, dtype, device, seed)
    slots, weights, load = _route(x, row_slots, gates, device)
    table = _moved(gates.table, torch.device("cpu"))
    expected = route_by_slot(x.cpu(), row_slots, gates.storage, table)
    assert torch.equal(slots, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(load, table.load)


def test_equal_products_go_to_the_lower_expert(device: torch.device) -> None:
    gates = _gates(64, [(8, 2), (8, 3)], torch.float32)
    row_slots = torch.tensor([0, 9], dtype=torch.int32)
    slots, weights, _ = _route(torch.zeros(2, 64, device=device), row_slots, gates, device)
    assert slots.tolist() == [[1, 2, *[-1] * 6], [10, 11, 12, *[-1] * 5]]
    torch.testing.assert_close(weights[:, :3], torch.tensor([[0.5, 0.5, 0], [1 / 3] * 3]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the interpreter, on NaN
def test_rows_that_are_no_numbers_name_experts_of_their_own_adapter(device: torch.device) -> None:
    gates = _gates(64, [None, (8, 3)], torch.float32)
    row_slots = torch.full((3,), 1, dtype=torch.int32)
    x = _rows(3, 64, torch.float32, device)
    clean = _route(x, row_slots, gates, device)
    x[0], x[1, 5] = torch.nan, torch.inf
    slots, weights, load = _route(x, row_slots, gates, device)
    for row in slots.tolist():
        used = [slot for slot in row if slot >= 0]
        assert used == row[: len(used)]
        assert len(set(used)) == len(used) > 0
        assert all(2 <= slot < 10 for slot in used)
    assert load[2:10].sum() == (slots >= 0).sum()
    assert torch.equal(slots[2], clean[0][2])
    assert torch.equal(weights[2], clean[1][2])


@pytest.mark.parametrize("dtype", BF16_DAILY)
def test_a_row_is_routed_alike_alone(device: torch.device, dtype: torch.dtype) -> None:
    gates = _gates(300, [(5, 2), None, (3, 3)], dtype)
    row_slots = torch.tensor([0, 6, 7, -1, 0], dtype=torch.int32)
    x = _rows(5, 300, dtype, device)
    together = _route(x, row_slots, gates, device)
    for row in range(5):
        own = slice(row, row + 1)
        alone = _route(x[own], row_slots[own], gates, device)
        assert torch.equal(alone[0], together[0][own])
        assert torch.equal(alone[1], together[1][own])


class Block(NamedTuple):
    """An MLP block over rows of the base, of plain adapters and of experts."""

    up: LoraProblem  # target (ff, ff)
    down: LoraProblem
    slots: Tensor  # int32 [n_rows, MAX_CHOICES], on the device as all else
    weights: Tensor

    def on_cpu(self) -> Block:
        return Block(*(_on_cpu(p) for p in self[:2]), self.slots.cpu(), self.weights.cpu())

    def rows(self, rows: Tensor) -> Block:
        return Block(self.up.rows(rows), self.down.rows(rows), self.slots[rows], self.weights[rows])

    @property
    def pairs(self) -> RoutedPairs:
        segments = expand_routed(self.slots, self.weights)
        return RoutedPairs(self.slots, self.weights, segments)


def _on_cpu(problem: LoraProblem) -> LoraProblem:
    tables = moved(problem.tables, torch.device("cpu"))
    tensors = {name: getattr(problem, name).cpu() for name in ("x", "base", "slots")}
    return dataclasses.replace(problem, tables=tables, weights=None, **tensors)


def _block(
    device: torch.device, dtype: torch.dtype, *, ff: int = 33, n_rows: int = 11, width: int = 41
) -> Block:
    """Slot 0 is plain, 1 to 7 experts (of no rank, too); 8 is plain with scale and bias alone."""
    ranks = [5, 16, 0, 20, 1, 3, 7, 33, 0]
    slots = torch.full((n_rows, MAX_CHOICES), -1, dtype=torch.int32)
    weights = torch.zeros(n_rows, MAX_CHOICES)
    generator = torch.Generator().manual_seed(4)
    for row in range(n_rows):
        n = (0, 1, 2, 7, 1)[row % 5]
        if n == 1:
            slots[row, 0], weights[row, 0] = (0, 8)[row // 5 % 2], 1.0
        else:
            slots[row, :n] = torch.randperm(7, generator=generator)[:n].int() + 1
            weights[row, :n] = torch.rand(n, generator=generator)
    shared = {"dtype": dtype, "device": device, "slots": slots, "seed": 3}
    up = make_problem(
        in_features=width,
        out_features=(ff, ff),
        ranks=[(rank, rank) for rank in ranks],
        with_scale_and_bias=True,
        **shared,
    )
    down = make_problem(
        in_features=ff, out_features=(width,), ranks=[(rank,) for rank in ranks], **shared
    )
    wide = torch.full((n_rows, 2 * ff + 5), torch.nan, dtype=dtype, device=device)
    wide[:, : 2 * ff] = up.base
    up = dataclasses.replace(up, base=wide[:, : 2 * ff])
    return Block(up, down, slots.to(device), weights.to(device))


class Found(NamedTuple):
    act: Tensor
    out: Tensor


def _run(block: Block, *, block_m: int = 32, block_n: int = 64) -> Found:
    up, down = block.up, block.down
    n_slots = up.tables.ranks.shape[0]
    segments = build_device_segments(block.slots, block.weights, n_slots=n_slots)
    n_pairs = segments.indices.shape[0]
    shape = planes_shape(up.tables, segments, n_planes=1)
    planes = torch.full(shape, float("nan"), device=up.x.device)
    choice = ShrinkChoice(True, 2, 4, 2)
    lora_shrink(up.x, up.tables, segments, choice=choice, planes=planes)
    around = torch.full((n_pairs, up.target.out_features[0] + 3), torch.nan, dtype=up.x.dtype)
    pair_act = around.to(up.x.device)[:, :-3]
    tiles = ExpandChoice(block_m, block_n, 4, 2)
    expand_gate(planes, up.x, up.base, up.tables, segments, choice=tiles, out=pair_act)
    n_valid = int((block.slots >= 0).sum())
    assert bool(pair_act[n_valid:].isnan().all())  # padding is not written
    act = mix_pairs_triton(up.base, pair_act, segments)
    out = down.base.clone()
    add_pairs_triton(pair_act, act, down.tables, segments, out=out)
    return Found(act, out)


def _expected(block: Block) -> Found:
    block = block.on_cpu()
    up, down = block.up, block.down
    base = up.base.contiguous()
    pair_act = gate_pairs(up.x, base, block.pairs, up.tables)
    act = mix_pairs(base, pair_act, block.pairs)
    out = down.base.clone()
    add_pairs(pair_act, act, block.pairs, down.tables, out)
    return Found(act, out)


@pytest.mark.parametrize("dtype", BF16_DAILY)
@pytest.mark.parametrize(("ff", "n_rows"), [(33, 11), (130, 3)])
def test_blocks_of_experts_equal_the_reference(
    device: torch.device, dtype: torch.dtype, ff: int, n_rows: int
) -> None:
    block = _block(device, dtype, ff=ff, n_rows=n_rows)
    for mine, theirs in zip(_run(block), _expected(block), strict=True):
        limit = 4 * tolerance(dtype) * max(1.0, float(theirs.float().abs().max()))
        assert float((mine.cpu().float() - theirs.float()).abs().max()) <= limit


def _in_float64(problem: LoraProblem) -> LoraTables:
    return dataclasses.replace(problem.tables, storage=problem.tables.storage.double())


def test_the_reference_is_the_sum_over_a_rows_experts() -> None:
    """Row by row in float64, expert by expert, from the operator alone."""
    block = _block(torch.device("cpu"), torch.float32)
    found = _expected(block)
    for row, names in enumerate(block.slots.tolist()):
        total, out = 0.0, block.down.base[row : row + 1].double()
        for j, slot in enumerate(names):
            if slot < 0:
                continue
            one = build_segments(torch.tensor([slot], dtype=torch.int32))
            up, weight = block.up, block.weights[row, j].double()
            y = up.base[row : row + 1].double()
            lora_apply_reference(up.x[row : row + 1].double(), _in_float64(up), one, out=y)
            gate, linear = y.chunk(2, dim=1)
            act = torch.nn.functional.silu(gate) * linear
            total = total + weight * act
            down, delta = block.down, torch.zeros_like(out)
            lora_apply_reference(act, _in_float64(down), one, out=delta)
            out = out + weight * delta
        if names[0] < 0:
            gate, linear = block.up.base[row : row + 1].double().chunk(2, dim=1)
            total = torch.nn.functional.silu(gate) * linear
        torch.testing.assert_close(found.act[row : row + 1].double(), total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.out[row : row + 1].double(), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", BF16_DAILY[:2])
def test_a_row_has_the_same_bits_alone_and_in_other_tiles(
    device: torch.device, dtype: torch.dtype
) -> None:
    block = _block(device, dtype)
    together = _run(block)
    others = _run(block, block_m=16, block_n=32)
    for row in (0, 1, 3):  # of the base, of a plain adapter, of seven experts
        alone = _run(block.rows(torch.tensor([row], device=device)))
        for mine, theirs, other in zip(alone, together, others, strict=True):
            assert torch.equal(mine[0], theirs[row])
            assert torch.equal(other[row], theirs[row])


def test_launchers_choose_tiles_by_themselves(device: torch.device) -> None:
    block = _block(device, torch.float32)
    segments = build_device_segments(block.slots, block.weights, n_slots=9)
    up = block.up
    pair_act = gate_pairs_triton(up.x, up.base, up.tables, segments)
    assert torch.equal(mix_pairs_triton(up.base, pair_act, segments), _run(block).act)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    gates = _gates(64, [(4, 2)], torch.float32)
    row_slots = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"row_slots must be int32 \[3\]"):
        _route(torch.zeros(3, 64, device=device), row_slots, gates, device)
    with pytest.raises(ValueError, match="x must be rows"):
        _route(torch.zeros(64, 2, device=device).T, row_slots, gates, device)
    block = _block(device, torch.float32)
    segments = build_device_segments(block.slots, block.weights, n_slots=9)
    up = block.up
    with pytest.raises(ValueError, match="gate_up is"):
        mix_pairs_triton(up.base[:3], up.base, segments)
    one = build_device_segments(block.slots[:, 0].contiguous())
    with pytest.raises(ValueError, match="several pairs a row"):
        gate_pairs_triton(up.x, up.base, up.tables, one)
