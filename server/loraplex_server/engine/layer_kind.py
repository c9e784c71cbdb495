"""What the rows of an adapter ask of the layers, where a step is recorded beforehand."""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from .device_parts import DeviceParts

__all__ = ["LayerKind", "kind_of"]


class LayerKind(IntEnum):
    """What the layers of a step have to be able to do; each can do what those before it can."""

    BASE = 0
    LORA = 1  # low-rank factors, scales and biases of outputs


def kind_of(parts: DeviceParts, outside: Collection[str]) -> LayerKind | None:
    """None for an adapter whose rows no recorded step computes.

    ``outside``: the embedding and the head, which run around what is recorded, in any form.
    """
    fallback = parts.fallback
    changed = {*fallback.modules, *fallback.replaced_weights, *fallback.token_rows}
    if fallback.norms or fallback.stacked or parts.gates or not changed <= set(outside):
        return None
    return LayerKind.LORA
