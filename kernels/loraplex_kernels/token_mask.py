"""Masks of tokens: bit ``i % 32`` of word ``i // 32`` says whether token i is allowed.

As llguidance and XGrammar fill them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from loraplex_kernels.cpu.model_ops import native_ops
from loraplex_kernels.cpu.native import library

__all__ = ["bits_of", "first_bit", "mask_bits", "select_allowed", "select_allowed_reference"]


def select_allowed(
    logits: NDArray[np.float32], mask: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The allowed ones of one row's logits [n_tokens], and their token ids, in order.

    One pass; a word without a bit costs one comparison for its 32 tokens.
    """
    if library() is None:
        return select_allowed_reference(logits, mask)
    _check(logits, mask)
    values = np.empty(len(logits), dtype=np.float32)
    ids = np.empty(len(logits), dtype=np.int32)
    n_found = native_ops(keep_gil=True).select_allowed(
        logits.ctypes.data, mask.ctypes.data, len(logits), values.ctypes.data, ids.ctypes.data
    )
    return values[:n_found], ids[:n_found]


def select_allowed_reference(
    logits: NDArray[np.float32], mask: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """``select_allowed`` in numpy."""
    _check(logits, mask)
    ids = np.flatnonzero(mask_bits(mask, len(logits))).astype(np.int32)
    return logits[ids], ids


def mask_bits(masks: NDArray[np.int32], n_tokens: int) -> NDArray[np.bool_]:
    """[..., n_words] → [..., n_tokens]."""
    bits = np.unpackbits(masks.astype("<i4").view(np.uint8), axis=-1, bitorder="little")
    return bits[..., :n_tokens].astype(np.bool_)


def bits_of(token_ids: Iterable[int], n_tokens: int) -> NDArray[np.int32]:
    """The mask [ceil(n_tokens / 32)] that allows these alone."""
    bits = np.zeros(-(-n_tokens // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def first_bit(mask: NDArray[np.int32]) -> int:
    """The first token that a mask [n_words] allows; it allows one."""
    word = int(np.flatnonzero(mask)[0])
    value = int(mask[word])
    return word * 32 + (value & -value).bit_length() - 1


def _check(logits: NDArray[np.float32], mask: NDArray[np.int32]) -> None:
    """The C code walks memory: other layouts are a mistake of ours."""
    assert logits.dtype == np.float32
    assert mask.dtype == np.int32
    assert logits.ndim == mask.ndim == 1
    assert logits.flags.c_contiguous
    assert mask.flags.c_contiguous
    assert len(mask) * 32 >= len(logits)
