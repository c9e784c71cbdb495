"""From logits to tokens, vectorised over the rows of a step.

A row's outcome depends on its own logits, parameters, seed and output length alone, so a seeded
request gives the same tokens whatever else is in the batch. Randomness is one uniform number per
(seed, output position), used to invert the cumulative distribution over candidates sorted by
probability.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.token_mask import select_allowed

from .constraint import Constraint
from .errors import AdapterUnservable, EngineError, GrammarTooComplex, NoTokenAllowed
from .events import TokenLogprobs
from .request import Request
from .sampling_params import SamplingParams

__all__ = [
    "Sampled",
    "forced_token",
    "is_plainly_greedy",
    "logprobs_of",
    "prompt_logprobs_of",
    "sample",
]

# Smaller temperatures and larger logits would overflow in the softmax; neither changes an answer.
_MIN_TEMPERATURE = 1e-6
_MAX_PENALISED = 1e30
_N_CANDIDATES = 256  # most nuclei fit; a row whose nucleus does not is sorted whole


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of one request."""

    token_id: int
    logprobs: TokenLogprobs | None
    error: EngineError | None = None  # there is no token: the request ends with this


def sample(
    logits: Tensor,
    requests: Sequence[Request],
    eos_token_ids: frozenset[int],
    masks: NDArray[np.int32] | None = None,
) -> list[Sampled]:
    """``logits`` float32 [n, vocab_size], row i of ``requests[i]``; changed in place.

    ``masks``: the allowed tokens, see ``TokenMasks.wait``; read for rows with a grammar alone.
    Engine thread only.
    """
    logprobs: list[TokenLogprobs | None] = [None] * len(requests)
    wanted = [i for i, r in enumerate(requests) if r.source.sampling.logprobs is not None]
    raw = logits[wanted].clone() if wanted else None  # before the logits are changed
    failed: dict[int, EngineError] = {}
    for row, request in enumerate(requests):
        try:
            if _is_adjusted(request):
                _adjust(logits[row], request, eos_token_ids)
        except NoTokenAllowed as error:
            failed[row] = error
    token_ids = logits.numpy().argmax(-1).tolist()  # torch's takes seven times as long
    for row, request in enumerate(requests):
        if request.constraint is None or row in failed:
            continue
        allowed = None if masks is None else masks[row]
        try:
            token_ids[row] = _constrained(logits[row], request, request.constraint, allowed)
        except (NoTokenAllowed, GrammarTooComplex) as error:
            failed[row] = error
    random = [
        i
        for i, r in enumerate(requests)
        if r.constraint is None and not r.source.sampling.greedy and i not in failed
    ]
    if random:
        for row, token in zip(
            random, _draw(logits[random], [requests[i] for i in random]), strict=True
        ):
            token_ids[row] = token
    if raw is not None:
        chosen = [token_ids[i] for i in wanted]
        n_top = [requests[i].source.sampling.logprobs or 0 for i in wanted]
        for row, entry in zip(wanted, logprobs_of(raw, chosen, n_top), strict=True):
            logprobs[row] = entry
    return [
        Sampled(token, entry, failed.get(row))
        for row, (token, entry) in enumerate(zip(token_ids, logprobs, strict=True))
    ]


def is_plainly_greedy(request: Request) -> bool:
    """Whether the next token is the argmax of unchanged logits, without log-probabilities."""
    params = request.source.sampling
    return params.greedy and params.logprobs is None and not _is_adjusted(request)


def forced_token(request: Request, token_id: int) -> int:
    """What the request's grammar says comes next, or ``token_id`` where it leaves a choice."""
    forced = None if request.constraint is None else request.constraint.forced
    return token_id if forced is None else forced


def prompt_logprobs_of(logits: Tensor, token_ids: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """As ``logprobs_of``, with the rank of each token: 1 is the most likely."""
    found = logprobs_of(logits, token_ids, [n_top] * len(token_ids))
    own = logits.gather(1, torch.tensor(token_ids).unsqueeze(1))
    ranks = (logits >= own).sum(-1).tolist()
    return [replace(entry, rank=rank) for entry, rank in zip(found, ranks, strict=True)]


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


def _constrained(
    row: Tensor, request: Request, constraint: Constraint, mask: NDArray[np.int32] | None
) -> int:
    """One token of those that the grammar allows; all that is made of a row is made of these."""
    banned = _ends_of_bad_words(request)
    if constraint.forced is not None:
        if constraint.forced in banned:
            raise _forbidden_by_bad_words()
        return constraint.forced
    assert mask is not None
    values, ids = select_allowed(row.numpy(), mask)
    if not ids.size:
        raise GrammarTooComplex(
            f"the grammar allows no token here ({constraint.error or 'a dead end'}); simplify it"
        )
    if (values == -np.inf).all():
        ids = ids[~np.isin(ids, list(banned))]
        if not ids.size:
            raise _forbidden_by_bad_words()
        return int(ids[0])  # min_tokens forbids the end, which is all there is
    if request.source.sampling.greedy:
        return int(ids[values.argmax()])
    return int(ids[_draw(torch.from_numpy(values).unsqueeze(0), [request])[0]])


def _forbidden_by_bad_words() -> NoTokenAllowed:
    return NoTokenAllowed(
        "bad_words forbid every token that the answer's grammar allows here; leave out words that "
        "the schema needs",
        "bad_words",
    )


def _is_adjusted(request: Request) -> bool:
    """Whether ``_adjust`` may change this request's logits."""
    params = request.source.sampling
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_words
        or params.allowed_token_ids is not None
        or request.n_output < params.min_tokens
    )


def _adjust(row: Tensor, request: Request, eos_token_ids: frozenset[int]) -> None:
    """Bias, penalties and forbidden tokens, in the order ``SamplingParams`` states."""
    params = request.source.sampling
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias))
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({t for t in request.token_ids if t >= 0}))
        values = row[seen]
        penalty = params.repetition_penalty
        penalised = torch.where(values > 0, values / penalty, values * penalty)
        row[seen] = penalised.clamp_(max=_MAX_PENALISED)
    if (params.presence_penalty or params.frequency_penalty) and request.n_output:
        ids, counts = torch.unique(torch.tensor(request.output_ids), return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts.to(row.dtype)
    banned = _ends_of_bad_words(request)
    ends = eos_token_ids | params.stop_token_ids if request.n_output < params.min_tokens else set()
    if params.allowed_token_ids is not None:
        left = params.allowed_token_ids - banned
        if not left:
            raise NoTokenAllowed(
                "bad_words forbid every one of allowed_token_ids here; allow other tokens",
                "bad_words",
            )
        kept = sorted(left - ends or left)  # min_tokens gives way: the row has to go on
        values = row[kept]
        row.fill_(-math.inf)
        row[kept] = values
        return
    if len(banned | ends) >= row.shape[0]:
        ends = set()
    if len(banned) >= row.shape[0]:
        raise NoTokenAllowed("bad_words forbid every token here; leave some out", "bad_words")
    if banned or ends:
        row[sorted(banned | ends)] = -math.inf


def _ends_of_bad_words(request: Request) -> set[int]:
    """The last tokens of those whose other tokens the output ends with."""
    words = request.source.sampling.bad_words
    if not words:
        return set()
    output = tuple(request.output_ids[-max(map(len, words)) :])
    return {word[-1] for word in words if output[len(output) - len(word) + 1 :] == word[:-1]}


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """One token of each row's filtered distribution (temperature, top_k, top_p, min_p).

    The passes over the vocabulary are made for all rows at once, the rest on each row's candidates.
    """
    temperatures = torch.tensor(
        [[max(r.source.sampling.temperature, _MIN_TEMPERATURE)] for r in requests]
    )
    probs = torch.softmax(logits / temperatures, dim=-1)
    values, ids = torch.topk(probs, min(_N_CANDIDATES, probs.shape[1]), dim=-1)
    drawn: list[int] = []
    for row, request in enumerate(requests):
        params, uniform = request.source.sampling, _uniform(request)
        candidates, candidate_ids = values[row].double().numpy(), ids[row].numpy()
        # what no filter cuts is drawn from the whole row, whose mass needs no order
        mass = None if _is_filtered(params) else float(probs[row].double().sum())
        if mass is None:
            enough = _is_enough(candidates, probs.shape[1], params)
        else:
            enough = uniform * mass < candidates.sum()
        if not enough:
            ordered, order = torch.sort(probs[row], descending=True, stable=True)
            candidates, candidate_ids = ordered.double().numpy(), order.numpy()
        weights = _filter(candidates, params)
        cumulative = np.cumsum(weights)
        target = uniform * (cumulative[-1] if mass is None else mass)
        index = int(np.searchsorted(cumulative, target, side="right"))
        if not cumulative[-1] > 0:  # zero, or no number
            raise AdapterUnservable(
                "the adapter's weights are so large that no token has a probability: its logits "
                "are infinite or no numbers; check its scale (alpha / r)"
            )
        drawn.append(int(candidate_ids[min(index, int(np.flatnonzero(weights)[-1]))]))
    return drawn


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _filter(probs: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """``probs`` descending; what the filters drop becomes 0."""
    kept = probs[: params.top_k] if params.top_k else probs
    if params.top_p < 1.0:
        # a token stays if the mass before it is still below top_p of what top_k left
        total = kept.sum() if params.top_k else 1.0
        kept = np.where(np.cumsum(kept) - kept < params.top_p * total, kept, 0.0)
    if params.min_p > 0.0:
        kept = np.where(kept >= params.min_p * kept[0], kept, 0.0)
    return kept


def _is_enough(candidates: NDArray[np.float64], vocab_size: int, params: SamplingParams) -> bool:
    """Whether the top candidates hold everything the filters can keep."""
    if len(candidates) == vocab_size or 0 < params.top_k <= len(candidates):
        return True
    if params.min_p > 0.0 and candidates[-1] < params.min_p * candidates[0]:
        return True
    return params.top_k == 0 and params.top_p < 1.0 and candidates.sum() >= params.top_p


def _uniform(request: Request) -> float:
    """In [0, 1), a function of the request's seed and output position only."""
    key = f"{request.seed}:{request.n_output}".encode()
    word = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (word >> 11) * 2.0**-53
