"""Sampling on a CPU by the arithmetic of ``formats.sampling_batch``.

Passes over the vocabulary run for all rows at once, the rest on each row's largest logits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.formats.sampling_batch import MASS_OF_ONE, SamplingBatch
from loraplex_kernels.reference.sampling import edit

from .token_mask import select_allowed

_N_CANDIDATES = 256  # enough for most nuclei; otherwise the whole row is sorted


class _Draw(NamedTuple):
    """The parameters of a row, see ``SamplingBatch``."""

    uniform: float
    temperature: float
    top_k: int
    top_p: float
    min_weight: float

    @property
    def is_cut(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_weight > 0.0


def sample_tokens_cpu(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """``sample_tokens``."""
    if batch.edit_tokens.numel():
        edit(logits, batch)
    parts = (batch.uniforms, batch.temperatures, batch.top_k, batch.top_p, batch.min_weights)
    draws = [_Draw(*row) for row in zip(*(part.tolist() for part in parts), strict=True)]
    tokens: list[int] = logits.numpy().argmax(-1).tolist()  # torch's takes seven times as long
    random = []
    rows = zip(batch.forced.tolist(), batch.mask_rows.tolist(), draws, strict=True)
    for i, (forced, mask_row, draw) in enumerate(rows):
        if forced >= 0:
            tokens[i] = forced
        elif mask_row >= 0:
            mask = batch.masks[mask_row].numpy()
            tokens[i] = _of_allowed(logits[i], mask, draw, must_choose=bool(batch.must_choose[i]))
        elif draw.temperature > 0:
            random.append(i)
        elif not logits[i, tokens[i]].item() > -math.inf:
            tokens[i] = -1
    if random:
        drawn = _draw(logits[random], [draws[i] for i in random])
        for i, token in zip(random, drawn, strict=True):
            tokens[i] = token
    return torch.tensor(tokens, dtype=torch.int32)


def _of_allowed(row: Tensor, mask: NDArray[np.int32], draw: _Draw, *, must_choose: bool) -> int:
    """Sample from the tokens of a mask."""
    values, ids = select_allowed(row.numpy(), mask)
    if (values == -np.inf).all():
        return int(ids[0]) if must_choose and ids.size else -1
    if draw.temperature > 0:
        place = _draw(torch.from_numpy(values).unsqueeze(0), [draw])[0]
    else:
        place = -1 if np.isnan(values).any() else int(values.argmax())
    return int(ids[place]) if place >= 0 else -1


def _draw(logits: Tensor, draws: Sequence[_Draw]) -> list[int]:
    """Sample a token of each row's filtered distribution; -1 for rows without a finite maximum."""
    temperatures = torch.tensor([[draw.temperature] for draw in draws])
    top = logits.amax(dim=-1, keepdim=True)
    is_finite = torch.isfinite(top).flatten().tolist()
    values, ids = torch.topk(logits, min(_N_CANDIDATES + 1, logits.shape[1]), dim=-1)
    weights = torch.sub(logits, top).div_(temperatures).exp_().numpy()
    return [
        _draw_row(logits[row], weights[row], values[row].numpy(), ids[row].numpy(), draw)
        if is_finite[row]
        else -1
        for row, draw in enumerate(draws)
    ]


def _draw_row(
    logits: Tensor,
    weights: NDArray[np.float32],
    top_values: NDArray[np.float32],
    top_ids: NDArray[np.int64],
    draw: _Draw,
) -> int:
    """Sample a token. ``weights`` are e^((logit − largest) / temperature) of each token."""
    # Without filters the total mass is that of the whole row and needs no order.
    needs_total = not draw.is_cut or (draw.top_p < 1.0 and draw.top_k == 0)
    total = int(_masses(weights).sum()) if needs_total else 0
    ids = _in_order(top_values, top_ids, len(weights))
    masses = _masses(weights[ids])
    if draw.is_cut:
        enough = _is_enough(masses, weights[ids], len(weights), total, draw)
    else:
        enough = _target(draw.uniform, total) < masses.sum()
    if not enough:
        ids = torch.sort(logits, descending=True, stable=True).indices.numpy()
        masses = _masses(weights[ids])
    if draw.is_cut:
        masses = _filter(masses, weights[ids], total, draw)
    cumulative = np.cumsum(masses)
    target = _target(draw.uniform, int(cumulative[-1]) if draw.is_cut else total)
    return int(ids[np.searchsorted(cumulative, target, side="right")])


def _masses(weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return weights from 0 to 1 as integers, whose sums are exact."""
    return (weights * np.float32(MASS_OF_ONE)).astype(np.int64)


def _target(uniform: float, mass: int) -> int:
    """Return the cumulative mass to sample at: the first token whose sum exceeds it is taken."""
    return min(int(uniform * mass), mass - 1)


def _in_order(
    values: NDArray[np.float32], ids: NDArray[np.int64], vocab_size: int
) -> NDArray[np.int64]:
    """Return the ids in sampling order: largest logit first, equal ones by id.

    Drops the last value of ``topk``, since equal logits may exist beyond it.
    """
    if len(values) < vocab_size:
        n_larger = int(np.count_nonzero(values > values[-1]))
        values, ids = values[:n_larger], ids[:n_larger]
    if (values[1:] == values[:-1]).any():
        return ids[np.lexsort((ids, -values))]
    return ids


def _filter(
    masses: NDArray[np.int64], weights: NDArray[np.float32], total: int, draw: _Draw
) -> NDArray[np.int64]:
    """Return ``masses`` with filtered tokens at 0. ``total`` is the mass of the whole row."""
    filtered = masses[: draw.top_k] if draw.top_k else masses
    if draw.top_p < 1.0:
        # a token stays if the mass before it is below top_p of the mass that top_k left
        limit = _nucleus(int(filtered.sum()) if draw.top_k else total, draw)
        filtered = np.where(np.cumsum(filtered) - filtered < limit, filtered, 0)
    if draw.min_weight > 0.0:
        is_likely = weights[: len(filtered)] >= draw.min_weight
        filtered = np.where(is_likely, filtered, 0)
    return filtered


def _is_enough(
    masses: NDArray[np.int64],
    weights: NDArray[np.float32],
    vocab_size: int,
    total: int,
    draw: _Draw,
) -> bool:
    """Return True if the candidates include every token that the filters keep."""
    if len(masses) == vocab_size or 0 < draw.top_k <= len(masses):
        return True
    if not len(masses):
        return False
    knows_nucleus = draw.top_k == 0 or draw.top_p >= 1.0  # else of all top_k tokens
    if knows_nucleus and draw.min_weight > 0.0 and weights[-1] < draw.min_weight:
        return True
    return draw.top_k == 0 and draw.top_p < 1.0 and masses.sum() >= _nucleus(total, draw)


def _nucleus(total: int, draw: _Draw) -> int:
    return max(1, math.ceil(draw.top_p * total))
