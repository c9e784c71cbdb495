"""Which rows of a step go through the layers together: those of recorded layers, and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from .adapter_rows import AdapterRows
from .forward_batch import FixedPlace
from .layer_kind import LayerKind, least_kind
from .scheduler import ScheduledChunk
from .step_graphs import StepGraphs

__all__ = ["StepPart", "parts_of"]


@dataclass(frozen=True, slots=True)
class StepPart:
    """Chunks of one forward."""

    chunks: Sequence[ScheduledChunk]
    kind: LayerKind = LayerKind.BASE
    place: FixedPlace | None = None  # of the recorded layers that compute them; None: free ones do


def parts_of(
    chunks: Sequence[ScheduledChunk], adapters: AdapterRows, graphs: StepGraphs | None
) -> list[StepPart]:
    """Those whose layers are recorded, then others that no recorded layers compute.

    The others follow in a forward of their own: the weights are read once more, and nobody loses
    the graph. All are others if the first ones alone have no graph either.
    """
    if graphs is None:
        return [StepPart(chunks)]
    kinds = [adapters.layer_kind(chunk.request) for chunk in chunks]
    asked = {kind for kind in kinds if kind is not None}
    common = {kind for kind in asked if LayerKind.LORA.does(kind)}
    # Kinds beyond LORA are recorded for fewer sizes: without one, their rows are others, too.
    for layers in dict.fromkeys((least_kind(asked), least_kind(common))):
        is_recorded = [kind is not None and layers.does(kind) for kind in kinds]
        recorded = list(compress(chunks, is_recorded))
        n_rows = sum(chunk.n_tokens for chunk in recorded)
        place = graphs.place(layers, n_rows, is_decode=n_rows == len(recorded))
        if place is not None:
            others = list(compress(chunks, (not found for found in is_recorded)))
            return [StepPart(recorded, layers, place), *([StepPart(others)] if others else [])]
    return [StepPart(chunks)]
