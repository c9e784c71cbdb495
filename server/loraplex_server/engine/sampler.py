"""From logits to tokens, vectorised over the rows of a step.

A row's outcome depends on its own logits, parameters, seed and output length alone, so a seeded
request gives the same tokens whatever else is in the batch. Randomness is one uniform number per
(seed, output position), used to invert the cumulative distribution over candidates sorted by
probability.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .events import TokenLogprobs
from .request import Request

__all__ = ["Sampled", "logprobs_of", "sample"]

_N_CANDIDATES = 256  # most nuclei fit; a row whose nucleus does not is sorted whole


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of one request."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(
    logits: Tensor, requests: Sequence[Request], eos_token_ids: frozenset[int]
) -> list[Sampled]:
    """``logits`` float32 [n, vocab_size], row i of ``requests[i]``; changed in place.

    Engine thread only.
    """
    logprobs: list[TokenLogprobs | None] = [None] * len(requests)
    wanted = [i for i, r in enumerate(requests) if r.source.sampling.logprobs is not None]
    raw = logits[wanted].clone() if wanted else None  # before the logits are changed
    for row, request in enumerate(requests):
        _adjust(logits[row], request, eos_token_ids)
    token_ids = torch.argmax(logits, dim=-1).tolist()
    for row, request in enumerate(requests):
        if not request.source.sampling.greedy:
            token_ids[row] = _draw(logits[row], request)
    if raw is not None:
        chosen = [token_ids[i] for i in wanted]
        n_top = [requests[i].source.sampling.logprobs or 0 for i in wanted]
        for row, entry in zip(wanted, logprobs_of(raw, chosen, n_top), strict=True):
            logprobs[row] = entry
    return [Sampled(t, entry) for t, entry in zip(token_ids, logprobs, strict=True)]


def logprobs_of(
    logits: Tensor, token_ids: Sequence[int], n_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-probabilities of the chosen and the ``n_top`` most likely tokens of each row."""
    table = torch.log_softmax(logits, dim=-1)
    chosen = table[torch.arange(len(token_ids)), torch.tensor(token_ids)].tolist()
    k = max(n_top, default=0)
    values, ids = torch.topk(table, k, dim=-1) if k else (table[:, :0], table[:, :0].long())
    rows = zip(token_ids, chosen, n_top, ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(top_ids[:n], top_values[:n], strict=True)))
        for token, logprob, n, top_ids, top_values in rows
    ]


def _adjust(row: Tensor, request: Request, eos_token_ids: frozenset[int]) -> None:
    """Bias, penalties and the minimum length, in the order ``SamplingParams`` states."""
    params = request.source.sampling
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias))
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({t for t in request.token_ids if t >= 0}))
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.n_output:
        ids, counts = torch.unique(torch.tensor(request.output_ids), return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts.to(row.dtype)
    if request.n_output < params.min_tokens:
        ended = sorted(eos_token_ids | params.stop_token_ids)
        if ended:
            row[torch.tensor(ended)] = float("-inf")


def _draw(row: Tensor, request: Request) -> int:
    """One token of the row's filtered distribution (temperature, top_k, top_p, min_p)."""
    params = request.source.sampling
    probs = torch.softmax(row / params.temperature, dim=-1)
    n_kept = min(_N_CANDIDATES, probs.shape[0])
    if 0 < params.top_k < n_kept:
        n_kept = params.top_k
    values, ids = torch.topk(probs, n_kept)
    if not _is_enough(values, probs, request):
        values, ids = torch.sort(probs, descending=True, stable=True)
        if params.top_k:
            values, ids = values[: params.top_k], ids[: params.top_k]
    values = values.double()
    if params.top_p < 1.0:
        # a token stays if the mass before it is still below top_p of what top_k left
        before = torch.cumsum(values, 0) - values
        values = values * (before < params.top_p * _mass(values, probs, request))
    if params.min_p > 0.0:
        values = values * (values >= params.min_p * values[0])
    cumulative = torch.cumsum(values, 0)
    target = _uniform(request) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(ids[min(index, int((values > 0).nonzero()[-1]))])


def _is_enough(values: Tensor, probs: Tensor, request: Request) -> bool:
    """Whether the top candidates hold everything the filters can keep."""
    params = request.source.sampling
    if values.shape[0] == probs.shape[0] or 0 < params.top_k <= values.shape[0]:
        return True
    if params.min_p > 0.0 and float(values[-1]) < params.min_p * float(values[0]):
        return True
    return params.top_k == 0 and params.top_p < 1.0 and float(values.sum()) >= params.top_p


def _mass(values: Tensor, probs: Tensor, request: Request) -> float:
    """What top_p is a share of: all of it, or what top_k left."""
    return float(values.sum()) if request.source.sampling.top_k else 1.0


def _uniform(request: Request) -> float:
    """In [0, 1), a function of the request's seed and output position only."""
    key = f"{request.seed}:{request.n_output}".encode()
    word = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (word >> 11) * 2.0**-53
