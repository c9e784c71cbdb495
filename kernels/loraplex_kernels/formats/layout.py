"""The data that a LoRA kernel reads: a target's geometry and tables, and the segments of a step.

    out[t, n] += Σ over segments s of t:  w[t, s] · Σ_r  B_s[r, n] · (Σ_k A_s[r, k] · x[t, k])

A *segment* is the rows of a step that share one *adapter slot* of the pool, which holds the factors
of one (adapter, expert). Factors lie in one flat storage tensor. Each factor is cut into pages of
at most ``PAGE_RANK`` rank rows. A page is contiguous and the table holds its element offset. So
ranks are not padded: a rank-8 adapter beside a rank-64 one reads and computes 8.
"""

from dataclasses import dataclass

from torch import Tensor

PAGE_RANK = 16
MAX_RANK = 512  # of an adapter, unless a server says otherwise
NO_PAGE = -1


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """The geometry of a group of linears that read the same input (q,k,v; gate,up; or one linear).

    ``out_features`` holds the width of each packed output in order. Their sum is the width of
    ``out``.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]

    @property
    def n_slices(self) -> int:
        return len(self.out_features)


@dataclass(frozen=True, slots=True)
class LoraTables:
    """The factors of every slot, for one target. Offsets count elements of the storage.

    Page ``p`` of slice ``i`` of slot ``e`` holds rank rows ``16p … min(16(p+1), rank)``:
    ``[rows, in_features]`` for A and ``[rows, out_features[i]]`` for Bᵀ, both contiguous. On a CPU
    a page may be coded (``exponent_coding``); then 1 is added to its offset, which becomes odd.
    For slots with a scale or a bias the output row is transformed last,
    ``y ← scale ⊙ (y + delta) + bias`` (DoRA, IA³, LoFiT, lora_bias).
    """

    target: LoraTarget
    storage: Tensor  # flat
    ranks: Tensor  # int32 [n_slots, n_slices]; 0 = the slot does not touch this slice
    a_pages: Tensor  # int64 [n_slots, n_slices, max_pages]
    b_pages: Tensor  # int64 [n_slots, n_slices, max_pages]
    scale: Tensor  # int64 [n_slots, n_slices]; NO_PAGE, or offset of [out_features[i]]
    bias: Tensor  # int64 [n_slots, n_slices]; NO_PAGE, or offset of [out_features[i]]


@dataclass(frozen=True, slots=True)
class LoraSegments:
    """The rows of one step grouped by adapter slot. All tensors are on the device of ``x``.

    ``indices[indptr[s] : indptr[s + 1]]`` are the rows of segment ``s``, ascending, each once. A
    row may be in several segments (routed experts), each with its weight. A row in no segment costs
    nothing. Segments with a negative slot are padding, for the fixed shapes of CUDA graphs.
    """

    slots: Tensor  # int32 [n_segments]
    indptr: Tensor  # int32 [n_segments + 1]
    indices: Tensor  # int32 [n_pairs], rows of the step
    weights: Tensor | None = None  # float32 [n_pairs], 1 when absent


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """The segments that occur in each block of rows, for rows with several segments."""

    n_rows: int
    n_items: Tensor  # int32 [n_blocks]
    slots: Tensor  # int32 [n_blocks * n_rows * k]; a block's items start at block * n_rows * k
    pairs: Tensor  # int32 [n_blocks * n_rows * k, n_rows]; -1 = the row is not in that segment


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSegments(LoraSegments):
    """``LoraSegments`` with the tables that GPU kernels walk. Shapes depend on n_rows and k."""

    n_rows: int
    block_m: int  # pairs of a tile
    tiles: Tensor  # int32 [n_tiles, 3]: slot (-1 = padding), first pair, number of pairs
    pair_of: Tensor  # int32 [n_rows, k]: position in ``indices`` of a row's pairs, -1 = none
    pair_segments: Tensor  # int32 [n_pairs]: the segment of each position; unset in the padding
    blocks: RowBlocks | None  # None = every row stands in at most one segment


def tile_rows(n_pairs: int) -> int:
    """Pairs in a tile of ``DeviceSegments``. All targets of a step share its segments."""
    return 16 if n_pairs <= 256 else 32 if n_pairs <= 1024 else 64
