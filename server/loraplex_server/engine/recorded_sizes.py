"""For how many rows steps are recorded at start, by what their layers can do.

Each size costs seconds at start and memory of the driver, a step in pieces as much as it has
layers. So kinds of layers that few adapters need have few sizes, and more spare rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loraplex_kernels.routers import MAX_CHOICES

from .layer_kind import LayerKind

__all__ = ["MAX_GRAPHS", "MAX_PAIRS", "RecordedSizes", "recorded_sizes"]

MAX_PAIRS = 2048  # of a recorded step with experts: bounds its workspace and the grouping of pairs
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
    if kind <= LayerKind.LORA:
        return RecordedSizes(_decode(max_requests), _mixed(max_mixed_rows, n_layers))
    most = MAX_PAIRS // MAX_CHOICES if kind >= LayerKind.ROUTED_MLP else max_requests
    n_requests = min(max_requests, most)
    powers = tuple(1 << i for i in range(n_requests.bit_length()) if 1 << i < n_requests)
    few = _mixed(min(max_mixed_rows, MAX_PAIRS // MAX_CHOICES), n_layers)
    return RecordedSizes((*powers, n_requests), _every_other(_every_other(few)))


def _decode(n_rows: int) -> tuple[int, ...]:
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, n_rows, 32))
    return (*(n for n in sizes if n < n_rows), n_rows)


def _mixed(n_rows: int, n_layers: int) -> tuple[int, ...]:
    """16, 32, 64, 96, 128, 192, 256, 384 …; with many layers every other of these, and so on."""
    if not n_rows:
        return ()
    powers = [1 << i for i in range(4, n_rows.bit_length())]
    between = {3 * n // 2 for n in powers if n >= 64}
    sizes = (*(n for n in sorted({*powers, *between}) if n < n_rows), n_rows)
    n_kinds = 2 + (len(LayerKind) - 2) / 4  # each of the others has about a fourth
    while len(sizes) > 1 and n_kinds * len(sizes) * (n_layers + 1) > MAX_GRAPHS:
        sizes = _every_other(sizes)
    return sizes


def _every_other(sizes: Sequence[int]) -> tuple[int, ...]:
    """The largest, the third largest …, ascending."""
    return tuple(sizes[::-1][::2][::-1])
