"""Sampling: a row's logits are split over programs, and its token is found without sorting the row.

    token = the first of the order with Σ mass up to and with it > target       (``sampling_batch``)

Three launches, whose programs follow from the shapes alone:

1. ``edit_kernel`` edits and masks a chunk of a row's logits, and notes the largest.
2. ``sort_kernel`` sorts the keys of a chunk and adds up their masses. A key is an int32 with the
   order of the logits.
3. ``draw_kernel`` finds the token at which the sum over all chunks exceeds the target. It searches
   the bits of the key four at a time, with a binary search in each sorted chunk. The same search by
   counts finds the end of top_k, and with the target ⌈top_p · Σ⌉ − 1 the end of the nucleus. Of
   tokens with one logit, the position in the order of ids decides.

Rows without a draw end at once in 2 and 3. Sums are integers, so no chunk size changes a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.sampling_batch import MASS_OF_ONE, MAX_PENALISED, SamplingBatch

_CHUNK = 2048  # tokens of a row that one program sorts
_SCRATCH = 2**24  # tokens that have scratch at once, of 12 bytes each: 200 MB
_MASS = tl.constexpr(MASS_OF_ONE)
_MAX = tl.constexpr(MAX_PENALISED)
_LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))
_NO_KEY = tl.constexpr(-(2**31))
_LEAST_KEY = tl.constexpr(-0x7F800001)  # of −inf
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def ordered_key(x):
    """Return an int32 with the order of float32 ``x``. Both zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """Return the float32 of an ``ordered_key``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, top, temperature):
    return tl.minimum(tl.exp(tl.div_rn(x - top, temperature)), 1.0)


@triton.jit
def find_positions(
    keys_ptr, bounds, first, last, top, temperature, IS_WEIGHT: tl.constexpr, HALVINGS: tl.constexpr
):
    """Return the number of keys ≥ ``bounds`` in descending keys; it is between first and last.

    With IS_WEIGHT the bounds are weights, else keys.
    """
    for _ in range(HALVINGS):
        middle = (first + last) // 2
        is_open = first < last
        key = tl.load(keys_ptr + middle, mask=is_open, other=0)
        if IS_WEIGHT:
            is_above = is_open & (weight_of(logit_of(key), top, temperature) >= bounds)
        else:
            is_above = is_open & (key >= bounds)
        last = tl.where(is_open & (is_above == 0), middle, last)
        first = tl.where(is_above, middle + 1, first)
    return first


@triton.jit
def sums_before(sums_ptr, positions):
    """Return the masses of the first ``positions`` keys of chunks, int64."""
    return tl.load(sums_ptr + positions - 1, mask=positions > 0, other=0)


@triton.jit
def find_crossing(
    keys_ptr, sums_ptr, chunk_starts, sizes, target,
    COUNTS: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Find the largest key K for which the mass (or count) of the keys ≥ K exceeds ``target``.

    Returns K, and for each chunk its numbers of keys > K and ≥ K. ``target`` is less than the sum
    over all keys.
    """
    ways = tl.arange(0, 16)[None, :]
    low = tl.min(sizes) * 0 + _NO_KEY  # the sum from this key up exceeds the target
    first, last = sizes * 0, sizes
    for step in range(8):
        width = 1 << (28 - 4 * step)
        bounds = low + ways * width
        positions = find_positions(
            keys_ptr + chunk_starts[:, None], bounds, first[:, None] + ways * 0,
            last[:, None] + ways * 0, 0.0, 1.0, False, HALVINGS,
        )  # fmt: skip
        if COUNTS:
            sums = tl.sum(positions.to(tl.int64), axis=0)
        else:
            sums = tl.sum(sums_before(sums_ptr + chunk_starts[:, None], positions), axis=0)
        n_parts = tl.sum((sums > target).to(tl.int32)) - 1
        low += n_parts * width
        last = tl.sum(tl.where(ways == n_parts, positions, 0), axis=1)
        if n_parts < 15:
            first = tl.sum(tl.where(ways == n_parts + 1, positions, 0), axis=1)
    return low, first, last


@triton.jit
def masses_at(sums_ptr, chunk_starts, first, last):
    """Return the mass above a key that ``find_crossing`` found, and the mass of one of its tokens.

    Tokens with one key have one mass.
    """
    above = tl.sum(sums_before(sums_ptr + chunk_starts, first))
    both = tl.sum(sums_before(sums_ptr + chunk_starts, last))
    return above, (both - above) // tl.maximum(tl.sum(last - first), 1)


@triton.jit
def edit_chunk(
    row_ptr, first_id, tokens_ptr, biases_ptr, counts_ptr, first_edit, end_edit, penalties_ptr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Apply the edits of tokens from ``first_id`` on, a chunk of them."""
    # A vector: Triton 3.9 interprets a comparison of a broadcast scalar as a float.
    repetition = tl.load(penalties_ptr + tl.zeros((CHUNK,), dtype=tl.int32))
    presence = tl.load(penalties_ptr + 1)
    frequency = tl.load(penalties_ptr + 2)
    for first in range(first_edit, end_edit, CHUNK):
        edit = first + tl.arange(0, CHUNK)
        token = tl.load(tokens_ptr + edit, mask=edit < end_edit, other=-1)
        inside = (token >= first_id) & (token < first_id + CHUNK)
        bias = tl.load(biases_ptr + edit, mask=inside, other=0.0)
        count = tl.load(counts_ptr + edit, mask=inside, other=-1)
        x = tl.load(row_ptr + token, mask=inside, other=0.0)
        x = tl.where(bias == float("-inf"), bias, x + bias)
        penalised = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where((count >= 0) & (repetition != 1.0), tl.minimum(penalised, _MAX), x)
        generated = x - (frequency * count.to(tl.float32) + presence)
        tl.store(row_ptr + token, tl.where(count > 0, generated, x), mask=inside)


@triton.jit
def load_row(partials_ptr, ids_ptr, row, n_chunks, CHUNKS: tl.constexpr):
    """Return what ``edit_kernel`` found in the chunks of a row.

    That is the largest logit, the first allowed token with it (-1: no token is allowed) and the
    number of NaN logits.
    """
    lanes = tl.arange(0, CHUNKS)
    inside = lanes < n_chunks
    at = row * n_chunks * 2 + lanes
    top = tl.max(tl.load(partials_ptr + at, mask=inside, other=float("-inf")))
    best = tl.load(partials_ptr + at + n_chunks, mask=inside, other=float("-inf"))
    best_id = tl.load(ids_ptr + at, mask=inside, other=_NO_ID)
    n_nan = tl.sum(tl.load(ids_ptr + at + n_chunks, mask=inside, other=0))
    first_id = tl.min(tl.where(best == tl.max(best), best_id, _NO_ID))
    return top, tl.where(first_id == _NO_ID, -1, first_id), n_nan


@triton.jit(do_not_specialize=["first_row", "vocab_size", "n_words"])
def edit_kernel(
    logits_ptr, partials_ptr, ids_ptr, penalties_ptr, forced_ptr, edit_starts_ptr,
    edit_tokens_ptr, edit_biases_ptr, edit_counts_ptr, mask_rows_ptr, masks_ptr,
    first_row, vocab_size, n_words,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Edit and mask a chunk of a row. Forced rows stay as they are."""
    place = tl.program_id(1)
    row = first_row + place
    if tl.load(forced_ptr + row) >= 0:
        return
    chunk = tl.program_id(0)
    n_chunks = tl.num_programs(0)
    row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
    edit_chunk(
        row_ptr, chunk * CHUNK, edit_tokens_ptr, edit_biases_ptr, edit_counts_ptr,
        tl.load(edit_starts_ptr + row), tl.load(edit_starts_ptr + row + 1),
        penalties_ptr + row * 3, CHUNK,
    )  # fmt: skip
    tl.debug_barrier()  # other threads of the program read the edits
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    allowed = ids < vocab_size
    x = tl.load(row_ptr + ids, mask=allowed, other=float("-inf"))
    mask = tl.load(mask_rows_ptr + row)
    if mask >= 0:
        word = tl.load(masks_ptr + mask.to(tl.int64) * n_words + ids // 32, mask=allowed, other=0)
        allowed = allowed & (((word >> (ids % 32)) & 1) != 0)
        x = tl.where(allowed, x, float("-inf"))
        tl.store(row_ptr + ids, x, mask=ids < vocab_size)
    clamped = tl.where(allowed, tl.maximum(x, _LOWEST), float("-inf"))
    best = tl.max(clamped)
    at = place * n_chunks * 2 + chunk
    tl.store(partials_ptr + at, tl.max(x))
    tl.store(partials_ptr + at + n_chunks, best)
    tl.store(ids_ptr + at, tl.min(tl.where(allowed & (clamped == best), ids, _NO_ID)))
    tl.store(ids_ptr + at + n_chunks, tl.sum((x != x).to(tl.int32)))


@triton.jit
def is_drawn(top, n_nan):
    return (top > float("-inf")) & (top < float("inf")) & (n_nan == 0)


@triton.jit(do_not_specialize=["first_row", "vocab_size"])
def sort_kernel(
    logits_ptr, partials_ptr, ids_ptr, keys_ptr, sums_ptr, temperatures_ptr, forced_ptr,
    first_row, vocab_size,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the keys of a chunk in descending order, and the sum of masses up to each."""
    place = tl.program_id(1)
    row = first_row + place
    temperature = tl.load(temperatures_ptr + row)
    if (temperature == 0.0) | (tl.load(forced_ptr + row) >= 0):
        return
    chunk = tl.program_id(0)
    n_chunks = tl.num_programs(0)
    top, _, n_nan = load_row(partials_ptr, ids_ptr, place, n_chunks, CHUNKS)
    if is_drawn(top, n_nan):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = ids < vocab_size
        row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
        x = tl.load(row_ptr + ids, mask=inside, other=float("-inf"))
        key = tl.sort(tl.where(inside, ordered_key(x), _NO_KEY), descending=True)
        x = tl.where(key < _LEAST_KEY, float("-inf"), logit_of(key))
        mass = (weight_of(x, top, temperature) * _MASS).to(tl.int64)
        at = (place.to(tl.int64) * n_chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
        tl.store(keys_ptr + at, key)
        tl.store(sums_ptr + at, tl.cumsum(mass, axis=0))


@triton.jit(do_not_specialize=["first_row", "vocab_size", "n_chunks"])
def draw_kernel(
    logits_ptr, partials_ptr, ids_ptr, keys_ptr, sums_ptr, out_ptr, uniforms_ptr, top_p_ptr,
    temperatures_ptr, min_weights_ptr, top_k_ptr, must_choose_ptr, forced_ptr,
    first_row, vocab_size, n_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Write the token of a row."""
    place = tl.program_id(0)
    row = first_row + place
    forced = tl.load(forced_ptr + row)
    if forced >= 0:
        tl.store(out_ptr + row, forced)
        return
    top, token, n_nan = load_row(partials_ptr, ids_ptr, place, n_chunks, CHUNKS)
    temperature = tl.load(temperatures_ptr + row)
    if (top == float("-inf")) & (tl.load(must_choose_ptr + row) == 0):
        token = -1
    if temperature > 0.0:
        if top == float("inf"):
            token = -1
        elif is_drawn(top, n_nan):
            keys_ptr += place.to(tl.int64) * n_chunks * CHUNK
            sums_ptr += place.to(tl.int64) * n_chunks * CHUNK
            chunk_starts = tl.arange(0, CHUNKS) * CHUNK
            sizes = tl.minimum(tl.maximum(vocab_size - chunk_starts, 0), CHUNK)
            total = tl.sum(sums_before(sums_ptr + chunk_starts, sizes))
            top_k = tl.load(top_k_ptr + row)
            if (top_k > 0) & (top_k < vocab_size):
                _, first, last = find_crossing(
                    keys_ptr,
                    sums_ptr,
                    chunk_starts,
                    sizes,
                    (top_k - 1).to(tl.int64),
                    True,
                    HALVINGS,
                )
                above, one = masses_at(sums_ptr, chunk_starts, first, last)
                total = above + (top_k - tl.sum(first)) * one
            top_p = tl.load(top_p_ptr + row)
            if top_p < 1.0:
                share = total.to(tl.float64) * top_p
                below = share.to(tl.int64)
                ceiling = tl.maximum(below + (below.to(tl.float64) < share).to(tl.int64), 1)
                target = tl.minimum(ceiling, total) - 1
                _, first, last = find_crossing(
                    keys_ptr, sums_ptr, chunk_starts, sizes, target, False, HALVINGS
                )
                above, one = masses_at(sums_ptr, chunk_starts, first, last)
                total = above + ((target - above) // one + 1) * one
            min_weight = tl.load(min_weights_ptr + row)
            if min_weight > 0.0:
                likely = find_positions(
                    keys_ptr + chunk_starts, min_weight, sizes * 0, sizes, top, temperature, True,
                    HALVINGS,
                )  # fmt: skip
                total = tl.minimum(total, tl.sum(sums_before(sums_ptr + chunk_starts, likely)))
            uniform = tl.load(uniforms_ptr + row)
            target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
            key, first, last = find_crossing(
                keys_ptr, sums_ptr, chunk_starts, sizes, target, False, HALVINGS
            )
            above, one = masses_at(sums_ptr, chunk_starts, first, last)
            turn = (target - above) // one  # of the tokens with this key, in the order of ids
            ties = (last - first).to(tl.int64)
            n_before = tl.cumsum(ties, axis=0) - ties
            is_chunk = (n_before <= turn) & (turn < n_before + ties)
            start = tl.sum(tl.where(is_chunk, chunk_starts, 0))
            turn -= tl.sum(tl.where(is_chunk, n_before, 0))
            ids = start + tl.arange(0, CHUNK)
            row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
            x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
            is_equal = (ordered_key(x) == key) & (ids < vocab_size)
            is_it = is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) - 1 == turn)
            token = tl.max(tl.where(is_it, ids, -1))
    tl.store(out_ptr + row, tl.where(n_nan > 0, -1, token))


def sample_tokens_triton(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """``sample_tokens`` in three launches for each ``_SCRATCH`` logits."""
    n_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32, not {logits.dtype}")
    if batch.temperatures.shape != (n_rows,) or batch.temperatures.device != logits.device:
        raise ValueError(f"the batch has {tuple(batch.temperatures.shape)} rows, not {n_rows}")
    if batch.masks.shape[1] * 32 < vocab_size:
        raise ValueError(f"masks of {batch.masks.shape[1]} words do not hold {vocab_size} tokens")
    out = torch.empty(n_rows, dtype=torch.int32, device=logits.device)
    chunk, n_chunks = _CHUNK, triton.cdiv(vocab_size, _CHUNK)
    size = min(n_rows, max(_SCRATCH // (n_chunks * chunk), 1))
    scratch = [
        torch.empty(size, *shape, dtype=dtype, device=logits.device)
        for shape, dtype in (
            ((2, n_chunks), torch.float32),  # largest logit, the same of allowed tokens
            ((2, n_chunks), torch.int32),  # first allowed token with it, NaN logits
            ((n_chunks, chunk), torch.int32),  # keys
            ((n_chunks, chunk), torch.int64),  # sums
        )
    ]
    lanes = triton.next_power_of_2(n_chunks)
    for first in range(0, n_rows, size or 1):
        n = min(size, n_rows - first)
        edit_kernel[(n_chunks, n)](
            logits, *scratch[:2], batch.penalties, batch.forced, batch.edit_starts,
            batch.edit_tokens, batch.edit_biases, batch.edit_counts, batch.mask_rows, batch.masks,
            first, vocab_size, batch.masks.shape[1],
            CHUNK=chunk, num_warps=8, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        sort_kernel[(n_chunks, n)](
            logits, *scratch, batch.temperatures, batch.forced, first, vocab_size,
            CHUNK=chunk, CHUNKS=lanes, num_warps=8, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        draw_kernel[(n,)](
            logits, *scratch, out, batch.uniforms, batch.top_p, batch.temperatures,
            batch.min_weights, batch.top_k, batch.must_choose, batch.forced,
            first, vocab_size, n_chunks,
            CHUNK=chunk, CHUNKS=lanes, HALVINGS=chunk.bit_length(),
            num_warps=8, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out
