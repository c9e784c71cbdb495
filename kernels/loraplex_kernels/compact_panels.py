"""Packed weights of the base in twelve bits a value, without loss.

A step of few rows waits for the weights, not for arithmetic, so a CPU that opens them beside its
products keeps them in three quarters of the bytes. A panel of 32 outputs has for every 64 inputs a
table of at most sixteen high bytes, then for each weight its low byte and the place of its high
byte in the table (``cpu/csrc/compact_panels.h`` has the bytes). Where there are more, these 64
inputs stay as they are.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu.native import Isa, isa, library

__all__ = ["COMPACT_PANELS", "compact_panels", "open_outputs"]

COMPACT_PANELS = 1  # added to the address of compact panels, for native code
_STRETCH_WORDS = 32
_MOST = 0.9  # of the plain bytes: above that, opening is not worth it


def compact_panels(words: Tensor) -> Tensor | None:
    """Pairs of bfloat16 [n_panels, n_words, 32] in int32 → the same as flat int32, or None.

    None where native code reads plain panels as fast, or where they hardly become smaller. May be
    moved to any address that is a multiple of 64 bytes. Runs on torch's threads.
    """
    n_panels, n_words, _ = words.shape
    lib = library()
    if lib is None or (isa() or Isa.PORTABLE) < Isa.AVX512_BF16 or n_words % _STRETCH_WORDS:
        return None
    starts = torch.empty(n_panels + 1, dtype=torch.int64)
    _compact(lib, words, starts, 0)
    n_bytes = int(starts[-1])
    if n_bytes > _MOST * words.nbytes:
        return None
    made = torch.empty(n_bytes // 4, dtype=torch.int32)
    made[: 2 * (n_panels + 1)] = starts.view(torch.int32)
    _compact(lib, words, starts, made.data_ptr())
    return made


def open_outputs(panels: Tensor, n_words: int, ids: Tensor) -> Tensor:
    """Outputs ``ids`` int64 [T] of compact ``panels``: bfloat16 [T, 2 · n_words]."""
    lib = library()
    assert lib is not None
    ids = ids.contiguous()
    rows = torch.empty((ids.shape[0], 2 * n_words), dtype=torch.bfloat16)
    lib.loraplex_open_outputs(
        ctypes.c_void_p(panels.data_ptr()),
        ctypes.c_int64(n_words),
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_int64(ids.shape[0]),
        ctypes.c_void_p(rows.data_ptr()),
    )
    return rows


def _compact(lib: ctypes.CDLL, words: Tensor, starts: Tensor, address: int) -> None:
    n_panels, n_words, _ = words.shape
    lib.loraplex_compact_panels(
        ctypes.c_void_p(words.data_ptr()),
        ctypes.c_int64(n_panels),
        ctypes.c_int64(n_words),
        ctypes.c_void_p(starts.data_ptr()),
        ctypes.c_void_p(address),
    )
