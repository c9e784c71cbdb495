"""The sampling parameters of a step, and how a row's token follows from its logits.

No step copies logits to the host, and no shape depends on data.

    order           largest logit first, equal ones by token id
    weight[i]       e^((logit[i] − largest) / temperature)                     float32, at most 1
    mass[i]         ⌊weight[i] · 2⁴⁰⌋                                          int64
    top_k           the first k of the order
    top_p           those with Σ mass before < ⌈top_p · Σ mass⌉                of what top_k left
    min_p           those with weight ≥ min_p
    token           the first with Σ mass up to and with it > ⌊uniform · Σ mass⌋

Masses are integers, so a sum is the same in every order of its terms. A row's token depends on its
own logits and parameters alone, in any batch and on any device. Logits are edited first:

    x ← x + bias;  if the token was seen: x > 0 ? x / repetition : x · repetition, at most 1e30;
    if it was generated: x ← x − (presence + frequency · count)

and tokens outside a row's mask become −inf.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .host_copy import move_together

MASS_OF_ONE = 2.0**40  # 2¹⁸ tokens of this mass still fit an int64
MAX_PENALISED = 1e30  # larger logits would overflow in the weights
_DTYPES: dict[str, type[np.generic]] = {
    "uniforms": np.float64,
    "top_p": np.float64,
    "temperatures": np.float32,
    "min_weights": np.float32,
    "penalties": np.float32,
    "edit_biases": np.float32,
}  # others int32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of n rows, on the device of the logits. ``pack_batch`` makes them.

    Each edit changes one logit. Row i has edits ``edit_starts[i] : edit_starts[i + 1]``, at most
    one for each token.
    """

    uniforms: Tensor  # float64 [n] in [0, 1)
    top_p: Tensor  # float64 [n]; 1 = all
    temperatures: Tensor  # float32 [n]; 0 = the largest logit
    min_weights: Tensor  # float32 [n]: min_p, rounded up
    penalties: Tensor  # float32 [n, 3]: repetition, presence, frequency
    top_k: Tensor  # int32 [n]; 0 = all
    must_choose: Tensor  # int32 [n]; 1 = take the first token if all are at −inf
    forced: Tensor  # int32 [n]: the token to return whatever the logits are; −1 = sample
    logprob_rows: Tensor  # int32 [n_asking]: for the caller; ``sample_tokens`` does not read it
    edit_starts: Tensor  # int32 [n + 1]
    edit_tokens: Tensor  # int32 [n_edits]
    edit_biases: Tensor  # float32 [n_edits]; −inf forbids the token
    # int32 [n_edits]: times in the output; 0 = in the prompt alone, −1 = unseen
    edit_counts: Tensor
    mask_rows: Tensor  # int32 [n]: the row of ``masks``; −1 = every token is allowed
    masks: Tensor  # int32 [n_masks, ceil(vocab_size / 32)]: bit i % 32 of word i // 32


def pack_batch(arrays: Mapping[str, NDArray[np.generic]], device: torch.device) -> SamplingBatch:
    """Copy ``arrays``, the fields of ``SamplingBatch`` by name, to the device at once."""
    names = [field.name for field in fields(SamplingBatch)]
    typed = [np.ascontiguousarray(arrays[n], dtype=_DTYPES.get(n, np.int32)) for n in names]
    return SamplingBatch(*move_together(typed, device))


def empty_batch(n_rows: int, vocab_size: int, device: torch.device) -> SamplingBatch:
    """Return a batch whose rows take their largest logit unchanged."""
    arrays: dict[str, NDArray[np.generic]] = {
        field.name: np.zeros(n_rows) for field in fields(SamplingBatch)
    }
    arrays |= {
        "penalties": np.zeros((n_rows, 3)),
        "forced": np.full(n_rows, -1),
        "edit_starts": np.zeros(n_rows + 1),
        "mask_rows": np.full(n_rows, -1),
        "masks": np.zeros((0, -(-vocab_size // 32))),
    }
    for name in ("logprob_rows", "edit_tokens", "edit_biases", "edit_counts"):
        arrays[name] = np.empty(0)
    return pack_batch(arrays, device)
