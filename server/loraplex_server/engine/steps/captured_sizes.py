"""The numbers of rows and positions for which steps are captured at start, by kind of layers.

Each size costs seconds at start and memory of the driver; a step in pieces costs as much for each
layer. So a kind of layers that few adapters need has few sizes, and more spare rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from loraplex_kernels.formats.gate_table import MAX_CHOICES
from loraplex_server.engine.adapters.layer_kind import LayerKind

MAX_PAIRS = 2048  # of a captured step with experts: bounds its workspace and the grouping of pairs
SHORT_POSITIONS = 2048  # of a request: decode steps of short requests are captured separately
MAX_GRAPHS = 2048  # of pieces of all kinds; decode steps add at most some dozens


class CapturedSizes(NamedTuple):
    """Numbers of rows, ascending."""

    decode: tuple[int, ...]  # one graph each
    mixed: tuple[int, ...]  # a graph for each piece between two attentions

    def of(self, *, is_decode: bool) -> tuple[int, ...]:
        return self.decode if is_decode else self.mixed


def captured_sizes(
    kind: LayerKind, max_requests: int, max_mixed_rows: int, n_layers: int
) -> CapturedSizes:
    """Return the sizes to capture. ``max_mixed_rows`` limits steps captured in pieces; 0 = none.

    Base and LoRA layers have 1, 2, 4, multiples of 8 up to 64, of 16 up to 128, and of 32. Layers
    with experts have powers of two.
    """
    common, routed = _mixed(max_mixed_rows, n_layers)
    if kind is not LayerKind.ROUTED_MLP:
        return CapturedSizes(_decode(max_requests), common)
    n_requests = min(max_requests, MAX_PAIRS // MAX_CHOICES)
    powers = tuple(1 << i for i in range(n_requests.bit_length()) if 1 << i < n_requests)
    return CapturedSizes((*powers, n_requests), routed)


def captured_positions(kind: LayerKind, max_positions: int) -> tuple[int, ...]:
    """The numbers of positions of a request for which decode steps are captured, ascending.

    Attention launches a program for each 512 positions (16 at most), KV head and row. Programs
    without work end at once, yet thousands of them take microseconds of every layer.
    """
    if kind is LayerKind.ROUTED_MLP or max_positions <= SHORT_POSITIONS:
        return (max_positions,)
    return (SHORT_POSITIONS, max_positions)


def _decode(n_rows: int) -> tuple[int, ...]:
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, n_rows, 32))
    return (*(n for n in sizes if n < n_rows), n_rows)


def _mixed(n_rows: int, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return 16, 32, 64, 96, 128, 192, 256, 384 …, and a fourth of these sizes for experts.

    With many layers every second size is dropped, first of the sizes for experts.
    """
    if not n_rows:
        return (), ()
    common, routed = _of_up_to(n_rows), _of_up_to(min(n_rows, MAX_PAIRS // MAX_CHOICES))
    routed = _every_other(_every_other(routed))
    while (2 * len(common) + len(routed)) * (n_layers + 1) > MAX_GRAPHS:
        if len(routed) > 1:
            routed = _every_other(routed)
        elif len(common) > 1:
            common = _every_other(common)
        else:
            break
    return common, routed


def _of_up_to(n_rows: int) -> tuple[int, ...]:
    powers = [1 << i for i in range(4, n_rows.bit_length())]
    between = {3 * n // 2 for n in powers if n >= 64}
    return (*(n for n in sorted({*powers, *between}) if n < n_rows), n_rows)


def _every_other(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the largest, the third largest …, ascending."""
    return tuple(sizes[::-1][::2][::-1])
