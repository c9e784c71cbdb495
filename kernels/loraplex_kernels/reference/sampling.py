"""The definition of sampling in PyTorch, on any device: it sorts every row."""

import torch
from torch import Tensor

from loraplex_kernels.formats.sampling_batch import MASS_OF_ONE, MAX_PENALISED, SamplingBatch

_LOWEST = torch.finfo(torch.float32).min
_INFINITY = float("inf")


def sample_tokens_reference(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """``sample_tokens``. Shapes depend on the shapes of the arguments alone."""
    edit(logits, batch)
    allowed = _allowed(logits, batch)
    logits.masked_fill_(~allowed, -_INFINITY)
    top = logits.amax(dim=-1)
    best = _first_largest(torch.where(allowed, logits.clamp(min=_LOWEST), -_INFINITY))
    greedy = batch.temperatures == 0
    drawn = _draw(logits, top, batch)
    token = torch.where(greedy, best, torch.where(top == _INFINITY, -1, drawn))
    token = torch.where(top == -_INFINITY, torch.where(batch.must_choose != 0, best, -1), token)
    token = torch.where(torch.isnan(top), -1, token)
    return torch.where(batch.forced >= 0, batch.forced, token).to(torch.int32)


def edit(logits: Tensor, batch: SamplingBatch) -> None:
    """Apply the edits of the batch in place."""
    tokens = batch.edit_tokens.long()
    position = torch.arange(tokens.shape[0], dtype=torch.int32, device=logits.device)
    rows = torch.searchsorted(batch.edit_starts, position, right=True) - 1
    repetition, presence, frequency = batch.penalties[rows].unbind(-1)
    x, bias, counts = logits[rows, tokens], batch.edit_biases, batch.edit_counts
    x = torch.where(bias == -_INFINITY, bias, x + bias)
    penalised = torch.where(x > 0, x / repetition, x * repetition).clamp(max=MAX_PENALISED)
    x = torch.where((counts >= 0) & (repetition != 1.0), penalised, x)
    generated = x - (frequency * counts + presence)
    logits[rows, tokens] = torch.where(counts > 0, generated, x)


def _allowed(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the allowed tokens of each row, bool [n, vocab_size]."""
    n_masks, n_words = batch.masks.shape
    free = torch.ones_like(logits, dtype=torch.bool)
    if n_masks == 0:
        return free
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    each = (batch.masks.unsqueeze(-1) >> bits) & 1
    masks = each.reshape(n_masks, n_words * 32)[:, : logits.shape[1]] != 0
    has_mask = (batch.mask_rows >= 0).unsqueeze(-1)
    return torch.where(has_mask, masks[batch.mask_rows.clamp(min=0).long()], free)


def _first_largest(x: Tensor) -> Tensor:
    """Return the first index of the largest value, int64 [n]; argmax may return any equal one."""
    ids = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(dim=-1, keepdim=True), ids, x.shape[1]).amin(dim=-1)


def _draw(logits: Tensor, top: Tensor, batch: SamplingBatch) -> Tensor:
    """Sample a token id for each row, int64 [n]. Greedy rows and rows without a finite logit get
    undefined values.
    """
    n_tokens = logits.shape[1]
    top = torch.where(torch.isfinite(top), top, 0.0).unsqueeze(-1)
    temperature = torch.where(batch.temperatures > 0, batch.temperatures, 1.0).unsqueeze(-1)
    weights = ((logits - top) / temperature).exp().clamp(max=1.0)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    weights = weights.gather(-1, order)
    masses = (weights * MASS_OF_ONE).to(torch.int64)
    rank = torch.arange(n_tokens, device=logits.device)
    k = torch.where(batch.top_k > 0, batch.top_k, n_tokens).unsqueeze(-1)
    masses = torch.where(rank < k, masses, 0)
    before = masses.cumsum(-1) - masses
    share = (batch.top_p * masses.sum(-1)).ceil().clamp(min=1).to(torch.int64).unsqueeze(-1)
    is_inside = (before < share) | (batch.top_p >= 1).unsqueeze(-1)
    is_likely = weights >= batch.min_weights.unsqueeze(-1)
    masses = torch.where(is_inside & is_likely, masses, 0)
    total = masses.sum(-1)
    target = torch.minimum((batch.uniforms * total).to(torch.int64), total - 1)
    index = (masses.cumsum(-1) <= target.unsqueeze(-1)).sum(-1).clamp(max=n_tokens - 1)
    return order.gather(-1, index.unsqueeze(-1)).squeeze(-1)
