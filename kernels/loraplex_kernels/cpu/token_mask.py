"""Masks of tokens: bit ``i % 32`` of word ``i // 32`` is 1 if token i is allowed.

llguidance and XGrammar fill masks in this form.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .model_ops import native_ops
from .native import library


def select_allowed(
    logits: NDArray[np.float32], mask: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the allowed logits of one row [n_tokens] and their token ids, in order.

    This is one pass, in which an empty word costs one comparison for its 32 tokens.
    """
    if library() is None:
        return select_allowed_reference(logits, mask)
    _check(logits, mask)
    values = np.empty(len(logits), dtype=np.float32)
    ids = np.empty(len(logits), dtype=np.int32)
    n_allowed = native_ops(keep_gil=True).select_allowed(
        logits.ctypes.data, mask.ctypes.data, len(logits), values.ctypes.data, ids.ctypes.data
    )
    return values[:n_allowed], ids[:n_allowed]


def select_allowed_reference(
    logits: NDArray[np.float32], mask: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """``select_allowed`` in numpy."""
    _check(logits, mask)
    ids = np.flatnonzero(mask_bits(mask, len(logits))).astype(np.int32)
    return logits[ids], ids


def mask_bits(masks: NDArray[np.int32], n_tokens: int) -> NDArray[np.bool_]:
    """Unpack masks [..., n_words] to [..., n_tokens]."""
    bits = np.unpackbits(masks.astype("<i4").view(np.uint8), axis=-1, bitorder="little")
    return bits[..., :n_tokens].astype(np.bool_)


def bits_of(token_ids: Iterable[int], n_tokens: int) -> NDArray[np.int32]:
    """Return the mask [ceil(n_tokens / 32)] that allows only these tokens."""
    bits = np.zeros(-(-n_tokens // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def first_bit(mask: NDArray[np.int32]) -> int:
    """Return the first token that a mask [n_words] allows. The mask must allow a token."""
    word = int(np.flatnonzero(mask)[0])
    value = int(mask[word])
    return word * 32 + (value & -value).bit_length() - 1


def _check(logits: NDArray[np.float32], mask: NDArray[np.int32]) -> None:
    """Check the layout that the C code assumes."""
    assert logits.dtype == np.float32
    assert mask.dtype == np.int32
    assert logits.ndim == mask.ndim == 1
    assert logits.flags.c_contiguous
    assert mask.flags.c_contiguous
    assert len(mask) * 32 >= len(logits)
