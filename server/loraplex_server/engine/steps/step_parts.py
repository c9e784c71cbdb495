"""Divides a step into the rows that captured layers compute, and the rows of an eager forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk

from .adapter_rows import AdapterRows
from .forward_batch import GraphBuffers
from .step_graphs import StepGraphs


@dataclass(frozen=True, slots=True)
class StepPart:
    """The chunks of one forward."""

    chunks: Sequence[ScheduledChunk]
    kind: LayerKind = LayerKind.BASE
    buffers: GraphBuffers | None = None  # inputs of captured layers; None: layers run eagerly


def parts_of(
    chunks: Sequence[ScheduledChunk], adapters: AdapterRows, graphs: StepGraphs | None
) -> list[StepPart]:
    """Return the part that captured layers compute, then the part with all other rows.

    The second part is a forward of its own. It reads the weights once more, and no other row loses
    its graph. All rows are one eager part if no graph holds the first part alone.
    """
    if graphs is None:
        return [StepPart(chunks)]
    kinds = [adapters.layer_kind(chunk.adapter_digest) for chunk in chunks]
    known = [kind for kind in kinds if kind is not None]
    highest = max(known, default=LayerKind.BASE)
    # A kind may have no graph of this size, or none at all: its rows run eagerly then, and the
    # others keep their graph.
    for layers in map(LayerKind, range(highest, -1, -1)):
        is_captured = [kind is not None and kind <= layers for kind in kinds]
        captured = list(compress(chunks, is_captured))
        n_rows = sum(chunk.n_rows for chunk in captured)
        buffers = graphs.buffers_for(layers, n_rows, is_decode=n_rows == len(captured))
        if buffers is not None:
            others = list(compress(chunks, (not is_in for is_in in is_captured)))
            return [StepPart(captured, layers, buffers), *([StepPart(others)] if others else [])]
    return [StepPart(chunks)]
