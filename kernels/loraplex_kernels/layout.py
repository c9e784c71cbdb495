"""What a LoRA kernel reads: target geometry, the tables of one target, and the segments of a step.

    out[t, n] += Σ over segments s of t:  w[t, s] · Σ_r  B_s[r, n] · (Σ_k A_s[r, k] · x[t, k])

A *segment* is the rows of a step that share one *adapter slot* of the pool: the factors of one
(adapter, expert). Factors live in one flat storage tensor. Each factor is cut into pages of at most
``PAGE_RANK`` rank rows. A page is contiguous and the table holds its element offset, so ranks are
true in memory and in compute: a rank-8 adapter beside a rank-64 one reads and computes 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["NO_PAGE", "PAGE_RANK", "LoraSegments", "LoraTables", "LoraTarget"]

PAGE_RANK = 16
NO_PAGE = -1


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """Geometry of one group of linears that read the same input (q,k,v or gate,up or one alone).

    ``out_features`` holds the width of each packed output, in order; their sum is the width of
    ``out``. Packing is data: a lone linear is a group of one.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]

    @property
    def n_slices(self) -> int:
        return len(self.out_features)


@dataclass(frozen=True, slots=True)
class LoraTables:
    """Where the factors of every slot are, for one target. Offsets count elements of the storage.

    A page ``p`` of slice ``i`` of slot ``e`` holds rank rows ``16p … min(16(p+1), rank)``:
    ``[rows, in_features]`` for A and ``[rows, out_features[i]]`` for Bᵀ, both contiguous. On a CPU
    a page may be coded (``exponent_coding.py``): its offset is then one more, and odd.
    The output row is transformed last, ``y ← scale ⊙ (y + delta) + bias``, for the slots that
    have one (DoRA, IA³, LoFiT, lora_bias).
    """

    ranks: Tensor  # int32 [n_slots, n_slices]; 0 = the slot does not touch this slice
    a_pages: Tensor  # int64 [n_slots, n_slices, max_pages]
    b_pages: Tensor  # int64 [n_slots, n_slices, max_pages]
    scale: Tensor  # int64 [n_slots, n_slices]; NO_PAGE, or offset of [out_features[i]]
    bias: Tensor  # int64 [n_slots, n_slices]; NO_PAGE, or offset of [out_features[i]]


@dataclass(frozen=True, slots=True)
class LoraSegments:
    """The rows of one step grouped by adapter slot. Tensors only, all on the device of ``x``.

    ``indices[indptr[s] : indptr[s + 1]]`` are the rows of segment ``s``, ascending, each once. A
    row may stand in several segments (routed experts), each with its weight; a row in none costs
    nothing. Segments whose slot is negative are padding (fixed shapes inside CUDA graphs).
    """

    slots: Tensor  # int32 [n_segments]
    indptr: Tensor  # int32 [n_segments + 1]
    indices: Tensor  # int32 [n_pairs], rows of the step
    weights: Tensor | None = None  # float32 [n_pairs], 1 when absent
