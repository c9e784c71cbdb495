"""Sampling: one program takes a row from its logits to a token, without sorting it.

    token = the first of the order with Σ mass up to and with it > target       (``sampling``)

A program edits the row's logits and masks them, which also finds the largest. A random row then
looks for the place where a sum of masses passes its target by bisection over the bits of the key,
an int32 that is ordered as the logits are: four ways at once, so 16 passes over the row, which lies
in the L2 cache after the first. Ties end in one more pass that counts them in order of ids. The
same search with mass 1 a token finds the end of top_k, with ⌈top_p · Σ⌉ − 1 as the target that of
the nucleus. Sums are integers, so no tile size changes a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.sampling_reference import MASS_OF_ONE, MAX_PENALISED

if TYPE_CHECKING:
    from loraplex_kernels.sampling import SamplingBatch

__all__ = ["sample_tokens_triton"]

_BLOCK = 1024
_MASS = tl.constexpr(MASS_OF_ONE)
_MAX = tl.constexpr(MAX_PENALISED)
_LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))
_NO_KEY = tl.constexpr(-(2**31))
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def ordered_key(x):
    """int32, ordered as float32 ``x`` is; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_masses(
    row_ptr, ids, vocab_size, top, temperature, last_key, last_id, min_weight,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """Keys int32 and masses int64 of tokens ``ids``: 0 behind (last_key, last_id) in the order."""
    inside = ids < vocab_size
    x = tl.load(row_ptr + ids, mask=inside, other=float("-inf"))
    key = ordered_key(x)
    kept = inside & ((key > last_key) | ((key == last_key) & (ids <= last_id)))
    if COUNTS:
        return key, kept.to(tl.int64)
    weight = tl.minimum(tl.exp(tl.div_rn(x - top, temperature)), 1.0)
    mass = (weight * _MASS).to(tl.int64)
    return key, tl.where(kept & (weight >= min_weight), mass, 0)


@triton.jit
def sum_masses(
    row_ptr, vocab_size, top, temperature, last_key, last_id, min_weight, BLOCK: tl.constexpr
):
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, vocab_size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        _, mass = load_masses(
            row_ptr, ids, vocab_size, top, temperature, last_key, last_id, min_weight, False
        )
        total += mass
    return tl.sum(total)


@triton.jit
def find_crossing(
    row_ptr, vocab_size, top, temperature, last_key, last_id, min_weight, target,
    COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Key and id of the first token at which the sum passes ``target`` (less than the sum)."""
    lanes = tl.arange(0, BLOCK)
    low = tl.min(tl.full((BLOCK,), _NO_KEY, dtype=tl.int32))  # the sum from here up passes it
    for step in range(16):
        width = 1 << (30 - 2 * step)
        sum_1 = tl.zeros((BLOCK,), dtype=tl.int64)
        sum_2 = tl.zeros((BLOCK,), dtype=tl.int64)
        sum_3 = tl.zeros((BLOCK,), dtype=tl.int64)
        for first in range(0, vocab_size, BLOCK):
            key, mass = load_masses(
                row_ptr, first + lanes, vocab_size, top, temperature, last_key, last_id,
                min_weight, COUNTS,
            )  # fmt: skip
            sum_1 += tl.where(key >= low + width, mass, 0)
            sum_2 += tl.where(key >= low + 2 * width, mass, 0)
            sum_3 += tl.where(key >= low + 3 * width, mass, 0)
        n_parts = (tl.sum(sum_1) > target).to(tl.int32)
        n_parts += (tl.sum(sum_2) > target).to(tl.int32)
        n_parts += (tl.sum(sum_3) > target).to(tl.int32)
        low += n_parts * width
    above = tl.zeros((BLOCK,), dtype=tl.int64)
    one = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, vocab_size, BLOCK):
        key, mass = load_masses(
            row_ptr, first + lanes, vocab_size, top, temperature, last_key, last_id, min_weight,
            COUNTS,
        )  # fmt: skip
        above += tl.where(key > low, mass, 0)
        one = tl.maximum(one, tl.where(key == low, mass, 0))
    # Tokens of one key have one mass.
    turn = (target - tl.sum(above)) // tl.maximum(tl.max(one), 1)
    n_before = turn * 0
    found = tl.full((BLOCK,), -1, dtype=tl.int32)
    for first in range(0, vocab_size, BLOCK):
        ids = first + lanes
        x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        is_equal = ((ordered_key(x) == low) & (ids < vocab_size)).to(tl.int64)
        place = n_before + tl.cumsum(is_equal, axis=0) - 1
        found = tl.maximum(found, tl.where((is_equal != 0) & (place == turn), ids, -1))
        n_before += tl.sum(is_equal)
    return low, tl.max(found)


@triton.jit
def edit_row(
    row_ptr, tokens_ptr, biases_ptr, counts_ptr, first_edit, end_edit, penalties_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # As vectors: 3.9 interprets a comparison of a scalar, spread over lanes, as a float.
    repetition = tl.load(penalties_ptr + tl.zeros((BLOCK,), dtype=tl.int32))
    presence = tl.load(penalties_ptr + 1)
    frequency = tl.load(penalties_ptr + 2)
    for first in range(first_edit, end_edit, BLOCK):
        edit = first + tl.arange(0, BLOCK)
        inside = edit < end_edit
        token = tl.load(tokens_ptr + edit, mask=inside, other=0)
        bias = tl.load(biases_ptr + edit, mask=inside, other=0.0)
        count = tl.load(counts_ptr + edit, mask=inside, other=-1)
        x = tl.load(row_ptr + token, mask=inside, other=0.0)
        x = tl.where(bias == float("-inf"), bias, x + bias)
        penalised = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where((count >= 0) & (repetition != 1.0), tl.minimum(penalised, _MAX), x)
        put_out = x - (frequency * count.to(tl.float32) + presence)
        tl.store(row_ptr + token, tl.where(count > 0, put_out, x), mask=inside)


@triton.jit
def mask_row(row_ptr, mask_ptr, vocab_size, has_mask, BLOCK: tl.constexpr):
    """Writes −inf where a token is not allowed.

    The largest logit, the first token that has it (−1: none is allowed; of allowed ones that are
    all −inf the first), and how many are no numbers.
    """
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    best_id = tl.full((BLOCK,), _NO_ID, dtype=tl.int32)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    n_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, vocab_size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        allowed = ids < vocab_size
        x = tl.load(row_ptr + ids, mask=allowed, other=float("-inf"))
        if has_mask:
            word = tl.load(mask_ptr + ids // 32, mask=allowed, other=0)
            allowed = allowed & (((word >> (ids % 32)) & 1) != 0)
            x = tl.where(allowed, x, float("-inf"))
            tl.store(row_ptr + ids, x, mask=ids < vocab_size)
        n_nan += (x != x).to(tl.int32)
        top = tl.maximum(top, x)
        x = tl.where(allowed, tl.maximum(x, _LOWEST), float("-inf"))
        best_id = tl.where(x > best, ids, best_id)  # of equal ones the first of a lane stays
        best = tl.maximum(best, x)
    first_id = tl.min(tl.where(best == tl.max(best), best_id, _NO_ID))
    return tl.max(top), tl.where(first_id == _NO_ID, -1, first_id), tl.sum(n_nan)


@triton.jit(do_not_specialize=["vocab_size", "n_words"])
def sample_kernel(
    logits_ptr, out_ptr, uniforms_ptr, top_p_ptr, temperatures_ptr, min_weights_ptr, penalties_ptr,
    top_k_ptr, must_choose_ptr, forced_ptr, edit_starts_ptr, edit_tokens_ptr, edit_biases_ptr,
    edit_counts_ptr, mask_rows_ptr, masks_ptr, vocab_size, n_words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    forced = tl.load(forced_ptr + row)
    if forced >= 0:
        tl.store(out_ptr + row, forced)
        return
    row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
    edit_row(
        row_ptr, edit_tokens_ptr, edit_biases_ptr, edit_counts_ptr,
        tl.load(edit_starts_ptr + row), tl.load(edit_starts_ptr + row + 1),
        penalties_ptr + row * 3, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()  # other threads of the program read what was written
    mask = tl.load(mask_rows_ptr + row)
    mask_ptr = masks_ptr + tl.maximum(mask, 0).to(tl.int64) * n_words
    top, token, n_nan = mask_row(row_ptr, mask_ptr, vocab_size, mask >= 0, BLOCK)
    tl.debug_barrier()
    temperature = tl.load(temperatures_ptr + row)
    must_choose = tl.load(must_choose_ptr + row)
    if (top == float("-inf")) & (must_choose == 0):
        token = -1
    if temperature > 0.0:
        if top == float("inf"):
            token = -1
        elif (top > float("-inf")) & (n_nan == 0):
            top_k = tl.load(top_k_ptr + row)
            top_p = tl.load(top_p_ptr + row)
            min_weight = tl.load(min_weights_ptr + row)
            uniform = tl.load(uniforms_ptr + row)
            last_key = tl.min(tl.full((BLOCK,), _NO_KEY, dtype=tl.int32))
            last_id = tl.min(tl.full((BLOCK,), _NO_ID, dtype=tl.int32))
            if (top_k > 0) & (top_k < vocab_size):
                last_key, last_id = find_crossing(
                    row_ptr, vocab_size, top, temperature, last_key, last_id, 0.0,
                    (top_k - 1).to(tl.int64), True, BLOCK,
                )  # fmt: skip
            if top_p < 1.0:
                total = sum_masses(
                    row_ptr, vocab_size, top, temperature, last_key, last_id, 0.0, BLOCK
                )
                share = total.to(tl.float64) * top_p
                below = share.to(tl.int64)
                ceiling = tl.maximum(below + (below.to(tl.float64) < share).to(tl.int64), 1)
                last_key, last_id = find_crossing(
                    row_ptr, vocab_size, top, temperature, last_key, last_id, 0.0,
                    tl.minimum(ceiling, total) - 1, False, BLOCK,
                )  # fmt: skip
            total = sum_masses(
                row_ptr, vocab_size, top, temperature, last_key, last_id, min_weight, BLOCK
            )
            target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
            _, token = find_crossing(
                row_ptr, vocab_size, top, temperature, last_key, last_id, min_weight, target,
                False, BLOCK,
            )  # fmt: skip
    tl.store(out_ptr + row, tl.where(n_nan > 0, -1, token))


def sample_tokens_triton(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """``sample_tokens`` in one launch, a program a row."""
    n_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32, not {logits.dtype}")
    if batch.temperatures.shape != (n_rows,) or batch.temperatures.device != logits.device:
        raise ValueError(f"the batch has {tuple(batch.temperatures.shape)} rows, not {n_rows}")
    if batch.masks.shape[1] * 32 < vocab_size:
        raise ValueError(f"masks of {batch.masks.shape[1]} words do not hold {vocab_size} tokens")
    out = torch.empty(n_rows, dtype=torch.int32, device=logits.device)
    if n_rows == 0:
        return out
    sample_kernel[(n_rows,)](
        logits, out, batch.uniforms, batch.top_p, batch.temperatures, batch.min_weights,
        batch.penalties, batch.top_k, batch.must_choose, batch.forced, batch.edit_starts,
        batch.edit_tokens, batch.edit_biases, batch.edit_counts, batch.mask_rows, batch.masks,
        vocab_size, batch.masks.shape[1],
        BLOCK=_BLOCK, num_warps=16, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out
