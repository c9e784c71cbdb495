"""Experts by slot: gates, pairs and scales of inputs equal their references, within rows alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex_kernels.input_scales import (
    scale_inputs_of_each_reference,
    scale_inputs_reference,
)
from loraplex_kernels.moe_by_slot import (
    InputScales,
    RoutedPairs,
    add_pairs,
    gate_pairs,
    mix_pairs,
    sum_pairs,
)
from loraplex_kernels.reference import lora_apply_reference
from loraplex_kernels.routers import (
    MAX_CHOICES,
    MAX_EXPERTS,
    ROUTER_WORDS,
    GateFlags,
    GateRule,
    RouterTable,
    route_by_slot_reference,
)
from loraplex_kernels.segments import build_segments, expand_routed
from loraplex_kernels.triton import (
    add_pairs_triton,
    build_device_segments,
    gate_pairs_triton,
    lora_apply_triton,
    mix_pairs_triton,
    route_by_slot_triton,
    scale_inputs_of_each_triton,
    scale_inputs_triton,
    segments_of_pairs,
    sum_pairs_triton,
)
from loraplex_kernels.triton.moe import expand_gate
from loraplex_kernels.triton.shrink import lora_shrink, planes_shape
from loraplex_kernels.triton.tuning import ExpandChoice, ShrinkChoice
from tests.support.lora_problems import LoraProblem, make_problem, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {
    "top-k": lambda n: GateRule(min(2, n), GateFlags.RENORMALISED),
    "arrow": lambda n: GateRule(min(3, n), GateFlags.RENORMALISED | GateFlags.BY_SIZE),
    "top-p": lambda n: GateRule(min(MAX_CHOICES, n), GateFlags(0), 0.7),
    "switch": lambda n: GateRule(1, GateFlags(0)),
    "dense": lambda n: GateRule(n, GateFlags.IN_ORDER),
}


class Routers(NamedTuple):
    storage: Tensor
    table: RouterTable
    n_slots: int


def _routers(
    width: int, adapters: list[tuple[int, GateRule] | None], dtype: torch.dtype
) -> Routers:
    """Slot 0 upwards: each adapter's own, then its experts'. What no gate covers is NaN."""
    generator = torch.Generator().manual_seed(width)
    n_slots = sum(1 + (0 if one is None else one[0]) for one in adapters) + 1
    words = torch.full((n_slots, 3, ROUTER_WORDS), -1, dtype=torch.int64)
    top_p = torch.full((n_slots, 3), float("nan"))
    parts, size, slot = [torch.full((16,), float("nan"))], 16, 0
    for one in adapters:
        if one is not None:
            n_experts, rule = one
            gate = torch.randn(n_experts * width, generator=generator) * width**-0.5 * 2
            padding = torch.full((-gate.numel() % 16 + 16,), float("nan"))
            words[slot, 1] = torch.tensor([size, n_experts, slot + 1, *rule[:2]])
            top_p[slot, 1] = rule.top_p
            parts += [gate, padding]
            size += gate.numel() + padding.numel()
            slot += n_experts
        slot += 1
    storage = torch.cat(parts).view(dtype)
    load = torch.zeros(n_slots, dtype=torch.int64)
    return Routers(storage, RouterTable(words[:, 1], top_p[:, 1], load), n_slots)


def _moved(table: RouterTable, device: torch.device) -> RouterTable:
    return RouterTable(
        table.words.to(device), table.top_p.to(device), table.load.clone().to(device)
    )


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Rows with 7 unused columns behind them that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, width, generator=generator)
    padded = torch.cat((values, torch.full((n, 7), torch.nan)), dim=1).to(dtype).to(device)
    return padded[:, :width]


def _route(
    x: Tensor, row_slots: Tensor, routers: Routers, device: torch.device, **options: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, weights, load; the outputs are not initialised before."""
    table = _moved(routers.table, device)
    slots = torch.full((x.shape[0], MAX_CHOICES), 12345, dtype=torch.int32, device=device)
    weights = torch.full((x.shape[0], MAX_CHOICES), torch.nan, device=device)
    storage, row_slots = routers.storage.to(device), row_slots.to(device)
    route_by_slot_triton(x, row_slots, storage, table, slots=slots, weights=weights, **options)
    return slots.cpu(), weights.cpu(), table.load.cpu()


@settings(max_examples=8, deadline=None)
@given(
    adapters=st.lists(
        st.one_of(
            st.none(),
            st.tuples(
                st.sampled_from(sorted(RULES)),
                st.one_of(st.integers(1, MAX_EXPERTS), st.sampled_from([16, 17, MAX_EXPERTS])),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    width=st.sampled_from([41, 64, 300, 1111]),
    n_rows=st.integers(0, 13),
    dtype=st.sampled_from(DTYPES),
    slice_of=st.sampled_from([(0, 1, True), (1, 3, False), (0, 2, True)]),
    seed=st.integers(0, 99),
)
def test_gates_equal_the_reference(
    device: torch.device,
    adapters: list[tuple[str, int] | None],
    width: int,
    n_rows: int,
    dtype: torch.dtype,
    slice_of: tuple[int, int, bool],
    seed: int,
) -> None:
    known = [
        None if one is None else (min(one[1], MAX_CHOICES) if one[0] == "dense" else one[1], one[0])
        for one in adapters
    ]
    routers = _routers(
        width, [None if one is None else (one[0], RULES[one[1]](one[0])) for one in known], dtype
    )
    own, slot = [-1], 0
    for one in known:
        own.append(slot)
        slot += 1 + (0 if one is None else one[0])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(own), (n_rows,), generator=generator)
    row_slots = torch.tensor(own, dtype=torch.int32)[picks]
    index, n_slices, takes_plain = slice_of
    options = {"slice_index": index, "n_slices": n_slices, "takes_plain": takes_plain}
    x = _rows(n_rows, width, dtype, device, seed)
    slots, weights, load = _route(x, row_slots, routers, device, **options)
    table = _moved(routers.table, torch.device("cpu"))
    wanted = route_by_slot_reference(x.cpu(), row_slots, routers.storage, table, **options)
    assert torch.equal(slots, wanted[0])
    torch.testing.assert_close(weights, wanted[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(load, table.load)


def test_equal_products_go_to_the_lower_expert(device: torch.device) -> None:
    routers = _routers(64, [(8, RULES["top-k"](8)), (8, RULES["arrow"](8))], torch.float32)
    row_slots = torch.tensor([0, 9], dtype=torch.int32)
    slots, weights, _ = _route(torch.zeros(2, 64, device=device), row_slots, routers, device)
    assert slots.tolist() == [[1, 2, *[-1] * 6], [10, 11, 12, *[-1] * 5]]
    torch.testing.assert_close(weights[:, :3], torch.tensor([[0.5, 0.5, 0], [1 / 3] * 3]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the interpreter, on NaN
@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_no_numbers_name_experts_of_their_own_adapter(
    device: torch.device, rule: str
) -> None:
    routers = _routers(64, [None, (8, RULES[rule](8))], torch.float32)
    row_slots = torch.full((3,), 1, dtype=torch.int32)
    x = _rows(3, 64, torch.float32, device)
    clean = _route(x, row_slots, routers, device)
    x[0], x[1, 5] = torch.nan, torch.inf
    slots, weights, load = _route(x, row_slots, routers, device)
    for row in slots.tolist():
        used = [slot for slot in row if slot >= 0]
        assert used == row[: len(used)]
        assert len(set(used)) == len(used) > 0
        assert all(2 <= slot < 10 for slot in used)
    assert load[2:10].sum() == (slots >= 0).sum()
    assert torch.equal(slots[2], clean[0][2])
    assert torch.equal(weights[2], clean[1][2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_routed_alike_alone(device: torch.device, dtype: torch.dtype) -> None:
    routers = _routers(300, [(5, RULES["top-k"](5)), None, (3, RULES["top-p"](3))], dtype)
    row_slots = torch.tensor([0, 6, 7, -1, 0], dtype=torch.int32)
    x = _rows(5, 300, dtype, device)
    together = _route(x, row_slots, routers, device, takes_plain=True)
    for row in range(5):
        own = slice(row, row + 1)
        alone = _route(x[own], row_slots[own], routers, device, takes_plain=True)
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
        by_row = expand_routed(self.slots, self.weights)
        return RoutedPairs(self.slots, self.weights, by_row, build_segments(self.slots.flatten()))


def _on_cpu(problem: LoraProblem) -> LoraProblem:
    tables = dataclasses.replace(
        problem.tables,
        **{
            f.name: getattr(problem.tables, f.name).cpu()
            for f in dataclasses.fields(problem.tables)
        },
    )
    moved = {name: getattr(problem, name).cpu() for name in ("storage", "x", "base", "slots")}
    return dataclasses.replace(problem, tables=tables, weights=None, **moved)


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


def _scales(block: Block) -> InputScales:
    """Of the plain slot 0: the page of a factor serves as its vector."""
    row_slots = torch.where(block.slots[:, 0] == 0, 0, 1).int()
    row_slots[block.slots[:, 0] < 0] = -1
    offsets = torch.full((9, 4), -1, dtype=torch.int64, device=block.slots.device)
    offsets[0, 2] = block.down.tables.a_pages[0, 0, 0]
    return InputScales(row_slots, block.down.storage, offsets[:, 2])


def _run(block: Block, *, has_scales: bool, block_m: int = 32, block_n: int = 64) -> Found:
    up, down = block.up, block.down
    n_slots = up.tables.ranks.shape[0]
    segments = build_device_segments(block.slots, block.weights, n_slots=n_slots)
    n_pairs = segments.indices.shape[0]
    shape = planes_shape(up.target, up.tables, segments, n_planes=1)
    planes = torch.full(shape, float("nan"), device=up.x.device)
    inputs = (up.storage, up.target, up.tables, segments)
    lora_shrink(up.x, *inputs, ShrinkChoice(True, 2, 4, 2), planes=planes)
    around = torch.full((n_pairs, up.target.out_features[0] + 3), torch.nan, dtype=up.x.dtype)
    pair_act = around.to(up.x.device)[:, :-3]
    choice = ExpandChoice(block_m, block_n, 4, 2)
    expand_gate(planes, up.x, up.base, *inputs, choice, out=pair_act)
    n_valid = int((block.slots >= 0).sum())
    assert bool(pair_act[n_valid:].isnan().all())  # padding is not written
    act = mix_pairs_triton(up.base, pair_act, segments, _scales(block) if has_scales else None)
    out = down.base.clone()
    ids = torch.arange(n_pairs + 9, dtype=torch.int32, device=up.x.device)
    by_pair = segments_of_pairs(segments, ids)
    operands = (down.storage, down.target, down.tables, by_pair, segments)
    add_pairs_triton(pair_act, act, *operands, out=out)
    return Found(act, out)


def _wanted(block: Block, *, has_scales: bool) -> Found:
    block = block.on_cpu()
    up, down = block.up, block.down
    base = up.base.contiguous()
    pair_act = gate_pairs(up.x, base, block.pairs, up.storage, up.target, up.tables)
    act = mix_pairs(base, pair_act, block.pairs, _scales(block) if has_scales else None)
    out = down.base.clone()
    add_pairs(pair_act, act, block.pairs, down.storage, down.target, down.tables, out)
    return Found(act, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ff", "n_rows", "has_scales"), [(33, 11, True), (33, 5, False), (130, 3, True)]
)
def test_blocks_of_experts_equal_the_reference(
    device: torch.device, dtype: torch.dtype, ff: int, n_rows: int, has_scales: bool
) -> None:
    block = _block(device, dtype, ff=ff, n_rows=n_rows)
    found, wanted = (run(block, has_scales=has_scales) for run in (_run, _wanted))
    for mine, theirs in zip(found, wanted, strict=True):
        limit = 4 * tolerance(dtype) * max(1.0, float(theirs.float().abs().max()))
        assert float((mine.cpu().float() - theirs.float()).abs().max()) <= limit


def test_the_reference_is_the_sum_over_a_rows_experts() -> None:
    """Row by row in float64, expert by expert, from the operator alone."""
    block = _block(torch.device("cpu"), torch.float32)
    found = _wanted(block, has_scales=False)
    for row, names in enumerate(block.slots.tolist()):
        total, out = 0.0, block.down.base[row : row + 1].double()
        for j, slot in enumerate(names):
            if slot < 0:
                continue
            one = build_segments(torch.tensor([slot], dtype=torch.int32))
            up, weight = block.up, block.weights[row, j].double()
            y = up.base[row : row + 1].double()
            inputs = (up.storage.double(), up.target, up.tables, one)
            lora_apply_reference(up.x[row : row + 1].double(), *inputs, out=y)
            gate, linear = y.chunk(2, dim=1)
            act = torch.nn.functional.silu(gate) * linear
            total = total + weight * act
            down, delta = block.down, torch.zeros_like(out)
            inputs = (down.storage.double(), down.target, down.tables, one)
            lora_apply_reference(act, *inputs, out=delta)
            out = out + weight * delta
        if names[0] < 0:
            gate, linear = block.up.base[row : row + 1].double().chunk(2, dim=1)
            total = torch.nn.functional.silu(gate) * linear
        torch.testing.assert_close(found.act[row : row + 1].double(), total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.out[row : row + 1].double(), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_other_tiles(
    device: torch.device, dtype: torch.dtype
) -> None:
    block = _block(device, dtype)
    together = _run(block, has_scales=True)
    others = _run(block, has_scales=True, block_m=16, block_n=32)
    for row in (0, 1, 3):  # of the base, of a plain adapter, of seven experts
        alone = _run(block.rows(torch.tensor([row], device=device)), has_scales=True)
        for mine, theirs, other in zip(alone, together, others, strict=True):
            assert torch.equal(mine[0], theirs[row])
            assert torch.equal(other[row], theirs[row])


def _own_downs(device: torch.device, dtype: torch.dtype) -> tuple[Block, Tensor, Tensor]:
    """A block whose down outputs are scaled and shifted; what its pairs hold, and the base's
    products of that, both [n_rows, MAX_CHOICES, …], NaN where there is no pair."""
    block = _block(device, dtype)
    ranks = block.down.tables.ranks.flatten().tolist()
    down = make_problem(
        in_features=33, out_features=(41,), ranks=[(rank,) for rank in ranks], dtype=dtype,
        device=device, slots=block.slots.cpu(), seed=5, with_scale_and_bias=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(6)
    act = torch.randn(*block.slots.shape, 33, generator=generator)
    base = act @ torch.randn(33, 41, generator=generator) * 33**-0.5
    act[block.slots.cpu() < 0] = base[block.slots.cpu() < 0] = torch.nan
    return block._replace(down=down), act.to(dtype).to(device), base.to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_downs_of_their_own_are_summed_as_the_reference_does(
    device: torch.device, dtype: torch.dtype
) -> None:
    block, act, base = _own_downs(device, dtype)
    down, n_pairs = block.down, block.slots.numel()
    segments = build_device_segments(block.slots, block.weights, n_slots=9)
    ids = torch.arange(n_pairs, dtype=torch.int32, device=device)
    # The kernels' pairs stand by slot, those of no expert last.
    place = segments.pair_of.long()
    pair_act, of_pairs = (
        torch.full((n_pairs, values.shape[2]), torch.nan, dtype=dtype, device=device)
        for values in (act, base)
    )
    pair_act[place[place >= 0]], of_pairs[place[place >= 0]] = act[place >= 0], base[place >= 0]
    operands = (down.storage, down.target, down.tables, segments_of_pairs(segments, ids))
    lora_apply_triton(pair_act, *operands, out=of_pairs)
    found = down.base.clone()
    sum_pairs_triton(of_pairs, segments, out=found)

    block, of_pairs = block.on_cpu(), base.cpu().flatten(0, 1)
    down, pairs = block.down, block.pairs
    inputs = (down.storage, down.target, down.tables, pairs.by_pair)
    lora_apply_reference(act.cpu().flatten(0, 1), *inputs, out=of_pairs)
    wanted = down.base.clone()
    sum_pairs(of_pairs, pairs, wanted)
    limit = 4 * tolerance(dtype) * max(1.0, float(wanted.float().abs().max()))
    assert float((found.cpu().float() - wanted.float()).abs().max()) <= limit
    alone = block.slots[:, 0] < 0
    assert torch.equal(found.cpu()[alone], down.base[alone])


def test_launchers_choose_tiles_by_themselves(device: torch.device) -> None:
    block = _block(device, torch.float32)
    segments = build_device_segments(block.slots, block.weights, n_slots=9)
    up = block.up
    found = gate_pairs_triton(up.x, up.base, up.storage, up.target, up.tables, segments)
    act = mix_pairs_triton(up.base, found, segments, None)
    assert torch.equal(act, _run(block, has_scales=False).act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 41, 1100])
def test_inputs_are_scaled_as_the_reference_does(
    device: torch.device, dtype: torch.dtype, width: int
) -> None:
    vectors = torch.full((3, -(-width // 16) * 16 + 16), torch.nan)
    vectors[:, :width] = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    storage = vectors.to(dtype).flatten().to(device)
    offsets = torch.full((6, 3), -1, dtype=torch.int64, device=device)
    offsets[torch.tensor([0, 3, 5]), 1] = torch.arange(3, device=device) * vectors.shape[1]
    row_slots = torch.tensor([5, -1, 3, 1, 0, 3], dtype=torch.int32, device=device)
    around = torch.full((8, width + 3), torch.nan, dtype=dtype, device=device)
    x = around[1:7, :width]
    x.copy_(_rows(6, width, dtype, device))
    wanted = x.cpu().clone()
    scale_inputs_triton(x, row_slots, storage, offsets[:, 1])
    scale_inputs_reference(wanted, row_slots.cpu(), storage.cpu(), offsets[:, 1].cpu())
    assert torch.equal(x.cpu(), wanted)
    assert int(around.isnan().sum()) == around.numel() - x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [41, 1100])
def test_each_of_some_linears_reads_its_own_scaled_inputs(
    device: torch.device, dtype: torch.dtype, width: int
) -> None:
    vectors = torch.full((4, -(-width // 16) * 16 + 16), torch.nan)
    vectors[:, :width] = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    storage = vectors.to(dtype).flatten().to(device)
    offsets = torch.full((6, 7), -1, dtype=torch.int64, device=device)
    offsets[0, 2], offsets[0, 4], offsets[3, 3], offsets[5, 1] = torch.arange(4) * vectors.shape[1]
    row_slots = torch.tensor([5, -1, 3, 1, 0, 3], dtype=torch.int32, device=device)
    x = _rows(6, width, dtype, device)
    out = torch.full((3, 6, width), torch.nan, dtype=dtype, device=device)
    of_group = offsets[:, 2:5]  # slot 5 scales a linear of another group
    scale_inputs_of_each_triton(x, row_slots, storage, of_group, out=out)
    on_cpu = (x.cpu(), row_slots.cpu(), storage.cpu(), of_group.cpu())
    wanted = scale_inputs_of_each_reference(*on_cpu)
    assert torch.equal(out.cpu(), wanted)
    changed = [
        [not torch.equal(wanted[i, row], x[row].cpu()) for row in range(6)] for i in range(3)
    ]
    assert changed == [[row == 4 for row in range(6)], [row in (2, 5) for row in range(6)],
                       [row == 4 for row in range(6)]]  # fmt: skip


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    routers = _routers(64, [(4, RULES["top-k"](4))], torch.float32)
    row_slots = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"row_slots must be int32 \[3\]"):
        _route(torch.zeros(3, 64, device=device), row_slots, routers, device)
    with pytest.raises(ValueError, match="x must be rows"):
        _route(torch.zeros(64, 2, device=device).T, row_slots, routers, device)
    block = _block(device, torch.float32)
    segments = build_device_segments(block.slots, block.weights, n_slots=9)
    up = block.up
    with pytest.raises(ValueError, match="gate_up is"):
        mix_pairs_triton(up.base[:3], up.base, segments, None)
    one = build_device_segments(block.slots[:, 0].contiguous())
    with pytest.raises(ValueError, match="several a row"):
        gate_pairs_triton(up.x, up.base, up.storage, up.target, up.tables, one)
    scales = torch.zeros(4, dtype=torch.int64, device=device)
    copies = torch.empty(2, *up.x.shape, device=device)
    three = scales.new_zeros(4, 3)
    with pytest.raises(ValueError, match=r"out must be \[3"):
        scale_inputs_of_each_triton(up.x, block.slots[:, 0], up.storage, three, out=copies)
    with pytest.raises(ValueError, match="pairs are"):
        sum_pairs_triton(up.base, segments, out=up.base)
    with pytest.raises(ValueError, match="the pool"):
        scale_inputs_triton(up.x, block.slots[:, 0], up.storage.half(), scales)
