"""The gates of one MLP block's routed adapters, in a table that captured steps read.

    s = gate · x        the k experts with the largest s, of equal ones the lower index first
    weight = softmax of s over these k

This is MixLoRA's rule (``RoutingStrategy.TOP_K``), in float32 throughout.
"""

from dataclasses import dataclass

from torch import Tensor

MAX_EXPERTS = 64  # of one gate
MAX_CHOICES = 8  # experts of one row
GATE_WORDS = 4  # columns of ``GateTable.words``


@dataclass(frozen=True, slots=True)
class GateTable:
    """The gates of a block by adapter slot, on the device. Tensors may be strided views."""

    # int64 [n_slots, GATE_WORDS]: offset of the gate float32 [n_experts, in_features] in the
    # storage, counted in float32 (NO_PAGE: the slot has no experts here); number of experts; slot
    # of the first expert (the others follow); k
    words: Tensor
    load: Tensor  # int64 [n_slots], contiguous; rows routed so far to the expert in each slot
