"""For how many rows steps are recorded at start, by what their layers can do.

Each size costs seconds at start and memory of the driver, a step in pieces as much as it has
layers. So kinds of layers that few adapters need have few sizes, and more spare rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loraplex_kernels.routers import MAX_CHOICES

from .layer_kind import LayerKind

__all__ = ["MAX_GRAPHS", "MAX_PAIRS", "RecordedSizes", "recorded_positions", "recorded_sizes"]

MAX_PAIRS = 2048  # of a recorded step with experts: bounds its workspace and the grouping of pairs
SHORT_POSITIONS = 2048  # of a request, in decode steps that are recorded for short ones, too
MAX_GRAPHS = 2048  # of all kinds, but for decode steps, which are at most some dozen


class RecordedSizes(NamedTuple):
    """Rows, ascending."""

    decode: tuple[int, ...]  # one graph each
    mixed: tuple[int, ...]  # a graph for each piece between two attentions

    def of(self, *, is_decode: bool) -> tuple[int, ...]:
        return self.decode if is_decode else self.mixed


def recorded_sizes(
    kind: LayerKind, max_requests: int, max_mixed_rows: int, n_layers: int
) -> RecordedSizes:
    """``max_mixed_rows``: of steps that are recorded in pieces; 0 = none.

    Common kinds: 1, 2, 4, multiples of 8 up to 64, of 16 up to 128, of 32; others: powers of two.
    """
    common, rare = _mixed(max_mixed_rows, n_layers)
    if not kind.scales_inputs:
        return RecordedSizes(_decode(max_requests), common)
    most = MAX_PAIRS // MAX_CHOICES if kind.has_pairs else max_requests
    n_requests = min(max_requests, most)
    powers = tuple(1 << i for i in range(n_requests.bit_length()) if 1 << i < n_requests)
    return RecordedSizes((*powers, n_requests), rare)


def recorded_positions(kind: LayerKind, max_positions: int) -> tuple[int, ...]:
    """For how many positions of a request decode steps are recorded, ascending.

    Attention launches a program for each 512 of them (16 at most), each KV head and each row. Those
    that find nothing to do end at once, yet thousands of them take microseconds of every layer.
    """
    if kind.scales_inputs or max_positions <= SHORT_POSITIONS:
        return (max_positions,)
    return (SHORT_POSITIONS, max_positions)


def _decode(n_rows: int) -> tuple[int, ...]:
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, n_rows, 32))
    return (*(n for n in sizes if n < n_rows), n_rows)


def _mixed(n_rows: int, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of common kinds 16, 32, 64, 96, 128, 192, 256, 384 … and about a fourth of them of others.

    With many layers the others lose every second one first, then the common kinds.
    """
    if not n_rows:
        return (), ()
    common, rare = _of_up_to(n_rows), _of_up_to(min(n_rows, MAX_PAIRS // MAX_CHOICES))
    rare = _every_other(_every_other(rare))
    n_rare = sum(kind.scales_inputs for kind in LayerKind)
    n_common = len(LayerKind) - n_rare
    while (n_common * len(common) + n_rare * len(rare)) * (n_layers + 1) > MAX_GRAPHS:
        if len(rare) > 1:
            rare = _every_other(rare)
        elif len(common) > 1:
            common = _every_other(common)
        else:
            break
    return common, rare


def _of_up_to(n_rows: int) -> tuple[int, ...]:
    powers = [1 << i for i in range(4, n_rows.bit_length())]
    between = {3 * n // 2 for n in powers if n >= 64}
    return (*(n for n in sorted({*powers, *between}) if n < n_rows), n_rows)


def _every_other(sizes: Sequence[int]) -> tuple[int, ...]:
    """The largest, the third largest …, ascending."""
    return tuple(sizes[::-1][::2][::-1])
