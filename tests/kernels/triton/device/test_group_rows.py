"""Segments built on the device hold what the host's grouping holds, and more than it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.formats.layout import DeviceSegments, LoraSegments
from loraplex_kernels.triton.group_rows import (
    allocate_segments,
    build_device_segments,
    fill_device_segments,
)
from tests.support.adapters.lora_problems import MIXES, draw_slots

_few = settings(max_examples=12, deadline=None)


def _pairs_by_segment(segments: LoraSegments) -> dict[int, list[int]]:
    slots, indptr = segments.slots.tolist(), segments.indptr.tolist()
    return {
        slot: segments.indices[indptr[s] : indptr[s + 1]].tolist()
        for s, slot in enumerate(slots)
        if slot >= 0
    }


def _check(segments: DeviceSegments, slots: torch.Tensor, weights: torch.Tensor | None) -> None:
    table = slots.tolist()
    expected: dict[int, list[int]] = {}
    for row, names in enumerate(table):
        for slot in names:
            if slot >= 0:
                expected.setdefault(slot, []).append(row)
    assert _pairs_by_segment(segments) == dict(sorted(expected.items()))
    n_valid = sum(len(rows) for rows in expected.values())
    assert segments.indptr[-1] == n_valid
    covered = []
    for slot, first, count in segments.tiles.tolist():
        if slot >= 0:
            assert 0 < count <= segments.block_m
            covered += [(slot, position) for position in range(first, first + count)]
    ordered = [slot for slot, rows in sorted(expected.items()) for _ in rows]
    assert covered == list(zip(ordered, range(n_valid), strict=True))
    for row, names in enumerate(table):
        for turn, slot in enumerate(names):
            position = int(segments.pair_of[row, turn])
            assert (position >= 0) == (slot >= 0)
            if position >= 0:
                assert ordered[position] == slot
                assert segments.indices[position] == row
                if weights is not None and segments.weights is not None:
                    assert segments.weights[position] == weights[row, turn]


@_few
@given(
    n_rows=st.integers(0, 70),
    k=st.integers(1, 3),
    n_slots=st.integers(1, 40),
    mix=st.sampled_from(MIXES),
    block_m=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
def test_segments_group_every_pair_once(
    device: torch.device, n_rows: int, k: int, n_slots: int, mix: str, block_m: int, seed: int
) -> None:
    slots = draw_slots(mix, n_rows, k, n_slots, seed).to(device)
    weights = torch.rand(n_rows, k).to(device) if k > 1 else None
    segments = build_device_segments(slots, weights, n_slots=n_slots, block_m=block_m)
    _check(segments, slots, weights)
    _check_blocks(segments, slots)


def _check_blocks(segments: DeviceSegments, slots: torch.Tensor) -> None:
    blocks = segments.blocks
    if blocks is None:
        assert slots.shape[1] == 1
        return
    size = blocks.n_rows * slots.shape[1]
    for block, n_items in enumerate(blocks.n_items.tolist()):
        seen: list[tuple[int, int]] = []
        for item in range(block * size, block * size + n_items):
            slot = int(blocks.slots[item])
            for lane, pair in enumerate(blocks.pairs[item].tolist()):
                if pair >= 0:
                    assert segments.indices[pair] == block * blocks.n_rows + lane
                    seen.append((block * blocks.n_rows + lane, slot))
        rows = slots[block * blocks.n_rows : (block + 1) * blocks.n_rows].tolist()
        wanted = [
            (block * blocks.n_rows + lane, slot)
            for lane, names in enumerate(rows)
            for slot in names
            if slot >= 0
        ]
        assert sorted(seen) == sorted(wanted)


def test_the_same_buffers_serve_steps_with_other_segments(device: torch.device) -> None:
    """As a CUDA graph replays: stale segments, tiles and items of a fuller step must not stay."""
    segments = allocate_segments(24, 2, device, has_weights=False, n_slots=9, block_m=16)
    scratch = torch.empty((48, 3), dtype=torch.int32, device=device)
    for mix in ("distinct", "identical", "none", "zipf", "none"):
        slots = draw_slots(mix, 24, 2, 9, seed=3).to(device)
        fill_device_segments(slots, None, segments=segments, scratch=scratch)
        _check(segments, slots, None)
        _check_blocks(segments, slots)


def test_a_row_that_names_a_slot_twice_keeps_both_pairs(device: torch.device) -> None:
    slots = torch.tensor([[2, 2], [0, 2]], dtype=torch.int32, device=device)
    segments = build_device_segments(slots, torch.ones(2, 2, device=device))
    _check_blocks(segments, slots)
    assert _pairs_by_segment(segments) == {0: [1], 2: [0, 0, 1]}


def test_buffers_of_another_shape_are_refused(device: torch.device) -> None:
    segments = allocate_segments(4, 1, device, has_weights=False)
    scratch = torch.empty((4, 3), dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="slots are"):
        fill_device_segments(
            torch.zeros(5, 1, dtype=torch.int32, device=device),
            None,
            segments=segments,
            scratch=scratch,
        )
    with pytest.raises(ValueError, match="weights must be given"):
        fill_device_segments(
            torch.zeros(4, 1, dtype=torch.int32, device=device),
            torch.ones(4, 1, device=device),
            segments=segments,
            scratch=scratch,
        )
