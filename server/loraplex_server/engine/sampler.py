"""From logits to tokens on a CPU, vectorised over the rows of a step.

A row's outcome depends on its own logits, parameters, seed and output length alone, so a seeded
request gives the same tokens whatever else is in the batch. Randomness is one uniform number per
(seed, output position), used to invert the cumulative distribution over the tokens in order:
largest logit first, equal ones by id. ``loraplex_kernels.sampling`` defines the arithmetic, which
is the same on every device: masses are integers, so no order of summation changes a sum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.sampling import MASS_OF_ONE
from loraplex_kernels.token_mask import select_allowed

from .constraint import Constraint
from .errors import AdapterUnservable, EngineError, GrammarTooComplex, NoTokenAllowed
from .events import TokenLogprobs
from .request import Request
from .sampling_params import SamplingParams

__all__ = [
    "MIN_TEMPERATURE",
    "Sampled",
    "TokenRules",
    "dead_end",
    "forbidden_by_bad_words",
    "forced_token",
    "is_adjusted",
    "is_plainly_greedy",
    "least_weight",
    "logprobs_of",
    "no_token",
    "prompt_logprobs_of",
    "sample",
    "token_rules",
    "uniform_of",
]

# Smaller temperatures and larger logits would overflow in the softmax; neither changes an answer.
MIN_TEMPERATURE = 1e-6
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
            if is_adjusted(request):
                _adjust(logits[row], request, eos_token_ids)
        except NoTokenAllowed as error:
            failed[row] = error
    token_ids = logits.numpy().argmax(-1).tolist()  # torch's takes seven times as long
    for row, request in enumerate(requests):
        if row in failed:
            continue
        if request.constraint is None:
            is_greedy = request.source.sampling.greedy
            if is_greedy and not logits[row, token_ids[row]].item() > -math.inf:
                failed[row] = no_token()
            continue
        allowed = None if masks is None else masks[row]
        try:
            token_ids[row] = _constrained(logits[row], request, request.constraint, allowed)
        except (NoTokenAllowed, GrammarTooComplex, AdapterUnservable) as error:
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
    return params.greedy and params.logprobs is None and not is_adjusted(request)


def forced_token(request: Request, token_id: int) -> int:
    """What the request's grammar says comes next, or ``token_id`` where it leaves a choice."""
    forced = None if request.constraint is None else request.constraint.forced
    return token_id if forced is None else forced


def no_token() -> AdapterUnservable:
    """The error of a row in which no token can be drawn."""
    return AdapterUnservable(
        "the adapter's weights are so large that no token has a probability: its logits "
        "are infinite or no numbers; check its scale (alpha / r)"
    )


def dead_end(constraint: Constraint) -> GrammarTooComplex:
    """The error of a row whose grammar allows no token."""
    return GrammarTooComplex(
        f"the grammar allows no token here ({constraint.error or 'a dead end'}); simplify it"
    )


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
            raise forbidden_by_bad_words()
        return constraint.forced
    assert mask is not None
    values, ids = select_allowed(row.numpy(), mask)
    if not ids.size:
        raise dead_end(constraint)
    if (values == -np.inf).all():
        ids = ids[~np.isin(ids, list(banned))]
        if not ids.size:
            raise forbidden_by_bad_words()
        return int(ids[0])  # min_tokens forbids the end, which is all there is
    if request.source.sampling.greedy:
        largest = values.argmax()
        if np.isnan(values[largest]):
            raise no_token()
        return int(ids[largest])
    return int(ids[_draw(torch.from_numpy(values).unsqueeze(0), [request])[0]])


def forbidden_by_bad_words() -> NoTokenAllowed:
    return NoTokenAllowed(
        "bad_words forbid every token that the answer's grammar allows here; leave out words that "
        "the schema needs",
        "bad_words",
    )


def is_adjusted(request: Request) -> bool:
    """Whether bias, penalties or forbidden tokens may change this request's logits."""
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
    rules = token_rules(request, eos_token_ids, row.shape[0])
    if rules.kept is not None:
        kept = sorted(rules.kept)
        values = row[kept]
        row.fill_(-math.inf)
        row[kept] = values
    elif rules.forbidden:
        row[sorted(rules.forbidden)] = -math.inf


class TokenRules(NamedTuple):
    """Which tokens a request's own fields leave, whatever its grammar says."""

    kept: frozenset[int] | None  # of ``allowed_token_ids``; None: all that is not forbidden
    forbidden: set[int]  # by bad_words and min_tokens; empty beside ``kept``, which lacks them
    banned: set[int]  # by bad_words


def token_rules(request: Request, eos_token_ids: frozenset[int], vocab_size: int) -> TokenRules:
    """Raises NoTokenAllowed if bad_words leave none. min_tokens gives way: a row has to go on."""
    params = request.source.sampling
    banned = _ends_of_bad_words(request)
    ends = eos_token_ids | params.stop_token_ids if request.n_output < params.min_tokens else set()
    if params.allowed_token_ids is not None:
        left = params.allowed_token_ids - banned
        if not left:
            raise NoTokenAllowed(
                "bad_words forbid every one of allowed_token_ids here; allow other tokens",
                "bad_words",
            )
        return TokenRules(left - ends or left, set(), banned)
    if len(banned) >= vocab_size:
        raise NoTokenAllowed("bad_words forbid every token here; leave some out", "bad_words")
    every = banned | ends
    return TokenRules(None, every if len(every) < vocab_size else banned, banned)


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
    Changes ``logits``.
    """
    temperatures = torch.tensor(
        [[max(r.source.sampling.temperature, MIN_TEMPERATURE)] for r in requests]
    )
    top = logits.amax(dim=-1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        raise no_token()
    values, ids = torch.topk(logits, min(_N_CANDIDATES + 1, logits.shape[1]), dim=-1)
    weights = torch.sub(logits, top).div_(temperatures).exp_().numpy()
    return [
        _draw_row(logits[row], weights[row], values[row].numpy(), ids[row].numpy(), request)
        for row, request in enumerate(requests)
    ]


def _draw_row(
    logits: Tensor,
    weights: NDArray[np.float32],
    top_values: NDArray[np.float32],
    top_ids: NDArray[np.int64],
    request: Request,
) -> int:
    """``weights``: e^((logit − largest) / temperature) of each token."""
    params, uniform = request.source.sampling, uniform_of(request)
    # What no filter cuts is drawn from the whole row, whose mass needs no order.
    is_cut = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    needs_total = not is_cut or (params.top_p < 1.0 and params.top_k == 0)
    total = int(_masses(weights).sum()) if needs_total else 0
    ids = _in_order(top_values, top_ids, len(weights))
    masses = _masses(weights[ids])
    if is_cut:
        enough = _is_enough(masses, weights[ids], len(weights), total, params)
    else:
        enough = _target(uniform, total) < masses.sum()
    if not enough:
        ids = torch.sort(logits, descending=True, stable=True).indices.numpy()
        masses = _masses(weights[ids])
    if is_cut:
        masses = _filter(masses, weights[ids], total, params)
    cumulative = np.cumsum(masses)
    target = _target(uniform, int(cumulative[-1]) if is_cut else total)
    return int(ids[np.searchsorted(cumulative, target, side="right")])


def _masses(weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Weights from 0 to 1 as integers; their sums are exact."""
    return (weights * np.float32(MASS_OF_ONE)).astype(np.int64)


def _target(uniform: float, mass: int) -> int:
    """The token is the first whose cumulative mass is larger than this."""
    return min(int(uniform * mass), mass - 1)


def _in_order(
    values: NDArray[np.float32], ids: NDArray[np.int64], vocab_size: int
) -> NDArray[np.int64]:
    """The ids of which no other token is an equal or comes before: largest logit first, then by id.

    Of the last value there may be more beyond ``topk``, which takes any of equal ones.
    """
    if len(values) < vocab_size:
        n_sure = int(np.count_nonzero(values > values[-1]))
        values, ids = values[:n_sure], ids[:n_sure]
    if (values[1:] == values[:-1]).any():
        return ids[np.lexsort((ids, -values))]
    return ids


def _filter(
    masses: NDArray[np.int64], weights: NDArray[np.float32], total: int, params: SamplingParams
) -> NDArray[np.int64]:
    """``masses`` in order, ``total`` of the whole row; what the filters drop becomes 0."""
    kept = masses[: params.top_k] if params.top_k else masses
    if params.top_p < 1.0:
        # a token stays if the mass before it is still below top_p of what top_k left
        limit = _nucleus(int(kept.sum()) if params.top_k else total, params)
        kept = np.where(np.cumsum(kept) - kept < limit, kept, 0)
    if params.min_p > 0.0:
        kept = np.where(weights[: len(kept)] >= least_weight(params), kept, 0)
    return kept


def _is_enough(
    masses: NDArray[np.int64],
    weights: NDArray[np.float32],
    vocab_size: int,
    total: int,
    params: SamplingParams,
) -> bool:
    """Whether the top candidates hold everything the filters can keep."""
    if len(masses) == vocab_size or 0 < params.top_k <= len(masses):
        return True
    if not len(masses):
        return False
    knows_nucleus = params.top_k == 0 or params.top_p >= 1.0  # else of all top_k tokens
    if knows_nucleus and params.min_p > 0.0 and weights[-1] < least_weight(params):
        return True
    return params.top_k == 0 and params.top_p < 1.0 and masses.sum() >= _nucleus(total, params)


def _nucleus(total: int, params: SamplingParams) -> int:
    return max(1, math.ceil(params.top_p * total))


def least_weight(params: SamplingParams) -> np.float32:
    """The smallest float32 that is not below ``min_p``, the weight of the largest logit being 1."""
    least = np.float32(params.min_p)
    return least if float(least) >= params.min_p else np.nextafter(least, np.float32(np.inf))


def uniform_of(request: Request) -> float:
    """In [0, 1), a function of the request's seed and output position only."""
    key = f"{request.seed}:{request.n_output}".encode()
    word = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (word >> 11) * 2.0**-53
