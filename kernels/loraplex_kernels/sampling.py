"""From logits to token ids on any device, without a copy to the host and without data in a shape.

    order           largest logit first, equal ones by token id
    weight[i]       e^((logit[i] − largest) / temperature)                     float32, at most 1
    mass[i]         ⌊weight[i] · 2⁴⁰⌋                                          int64
    top_k           the first k of the order
    top_p           those with Σ mass before < ⌈top_p · Σ mass⌉                of what top_k left
    min_p           those with weight ≥ min_p
    token           the first with Σ mass up to and with it > ⌊uniform · Σ mass⌋

Masses are integers, so a sum is the same in every order of its terms: a row's token depends on its
own logits and parameters alone, whatever the batch and the device. Logits are edited before that:

    x ← x + bias;  if the token was seen: x > 0 ? x / repetition : x · repetition, at most 1e30;
    if it was put out: x ← x − (presence + frequency · count)

and tokens outside a row's mask become −inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sampling_reference import MASS_OF_ONE, MAX_PENALISED, sample_tokens_reference

__all__ = [
    "MASS_OF_ONE",
    "MAX_PENALISED",
    "SamplingBatch",
    "Staging",
    "empty_batch",
    "pack_batch",
    "sample_tokens",
]

_ALIGNMENT = 16  # bytes: Triton compiles other code for pointers that have less
_DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "uniforms": (torch.float64, np.float64),
    "top_p": (torch.float64, np.float64),
    "temperatures": (torch.float32, np.float32),
    "min_weights": (torch.float32, np.float32),
    "penalties": (torch.float32, np.float32),
    "top_k": (torch.int32, np.int32),
    "must_choose": (torch.int32, np.int32),
    "forced": (torch.int32, np.int32),
    "logprob_rows": (torch.int32, np.int32),
    "edit_starts": (torch.int32, np.int32),
    "edit_tokens": (torch.int32, np.int32),
    "edit_biases": (torch.float32, np.float32),
    "edit_counts": (torch.int32, np.int32),
    "mask_rows": (torch.int32, np.int32),
    "masks": (torch.int32, np.int32),
}


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What n rows ask for, on the logits' device. Made by ``pack_batch``.

    Edits change one logit each; those of row i are ``edit_starts[i] : edit_starts[i + 1]``, no
    token twice in a row.
    """

    uniforms: Tensor  # float64 [n] in [0, 1)
    top_p: Tensor  # float64 [n]; 1 = all
    temperatures: Tensor  # float32 [n]; 0 = the largest logit
    min_weights: Tensor  # float32 [n]: min_p, rounded up
    penalties: Tensor  # float32 [n, 3]: repetition, presence, frequency
    top_k: Tensor  # int32 [n]; 0 = all
    must_choose: Tensor  # int32 [n]; 1: of tokens that are all at −inf the first is taken
    forced: Tensor  # int32 [n]: the token that comes whatever the logits are; −1 = it is sampled
    logprob_rows: Tensor  # int32 [n_asking]: for the caller; ``sample_tokens`` does not read it
    edit_starts: Tensor  # int32 [n + 1]
    edit_tokens: Tensor  # int32 [n_edits]
    edit_biases: Tensor  # float32 [n_edits]; −inf forbids the token
    edit_counts: (
        Tensor  # int32 [n_edits]: times in the output; 0 = in the prompt alone, −1 = unseen
    )
    mask_rows: Tensor  # int32 [n]: the row of ``masks``; −1 = every token is allowed
    masks: Tensor  # int32 [n_masks, ceil(vocab_size / 32)]: bit i % 32 of word i // 32


class Staging:
    """Host memory from which a batch goes to the device in one copy. One thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.uint8)

    def bytes(self, n_bytes: int) -> Tensor:
        """uint8 [n_bytes], pinned where the device is a GPU. What it held before is gone.

        The caller has waited for the last copy out of it: a step ends when its ids have come.
        """
        if self._host.numel() < n_bytes:
            size = 1 << (n_bytes - 1).bit_length()
            pinned = self._device.type != "cpu" and torch.cuda.is_available()
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._host[:n_bytes]


def pack_batch(
    arrays: Mapping[str, NDArray[np.generic]], device: torch.device, staging: Staging
) -> SamplingBatch:
    """``arrays``: each field of ``SamplingBatch`` by its name. One copy to the device."""
    wanted = {
        field.name: np.ascontiguousarray(arrays[field.name], dtype=_DTYPES[field.name][1])
        for field in fields(SamplingBatch)
    }
    places: dict[str, int] = {}
    n_bytes = 0
    for name, array in wanted.items():
        places[name] = n_bytes
        n_bytes += -(-max(1, array.nbytes) // _ALIGNMENT) * _ALIGNMENT
    host = staging.bytes(n_bytes)
    memory = host.numpy()
    for name, array in wanted.items():
        memory[places[name] : places[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    moved.copy_(host, non_blocking=True)
    return SamplingBatch(
        **{
            name: moved[places[name] : places[name] + array.nbytes]
            .view(_DTYPES[name][0])
            .view(array.shape)
            for name, array in wanted.items()
        }
    )


def empty_batch(n_rows: int, vocab_size: int, device: torch.device) -> SamplingBatch:
    """Rows that take their largest logit as it is."""
    arrays: dict[str, NDArray[np.generic]] = {
        field.name: np.zeros(n_rows, _DTYPES[field.name][1]) for field in fields(SamplingBatch)
    }
    arrays |= {
        "penalties": np.zeros((n_rows, 3), np.float32),
        "forced": np.full(n_rows, -1, np.int32),
        "edit_starts": np.zeros(n_rows + 1, np.int32),
        "mask_rows": np.full(n_rows, -1, np.int32),
        "masks": np.zeros((0, -(-vocab_size // 32)), np.int32),
    }
    for name in ("logprob_rows", "edit_tokens", "edit_biases", "edit_counts"):
        arrays[name] = np.empty(0, _DTYPES[name][1])
    return pack_batch(arrays, device, Staging(device))


def sample_tokens(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """int32 [n]: a token of each row, −1 where none has a probability.

    ``logits`` float32 [n, vocab_size], contiguous; changed in place by edits and masks. Nothing
    waits for the device.
    """
    if logits.is_cuda:
        from .triton import sample_tokens_triton  # imports Triton, which a CPU does not need

        return sample_tokens_triton(logits, batch)
    return sample_tokens_reference(logits, batch)
