"""Sampling where the logits are, on any device but the CPU: only token ids come back.

A step is one copy to the device (parameters, penalised tokens, masks), one kernel, and one copy
back through pinned memory: ids, and log-probabilities for rows that asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.sampling import SamplingBatch, Staging, pack_batch, sample_tokens
from loraplex_kernels.token_mask import bits_of, first_bit

from .copy_back import CopyBack
from .errors import EngineError, GrammarTooComplex, NoTokenAllowed
from .events import TokenLogprobs
from .request import Request
from .sampler import (
    MIN_TEMPERATURE,
    Sampled,
    TokenRules,
    dead_end,
    forbidden_by_bad_words,
    forced_token,
    is_adjusted,
    least_weight,
    no_token,
    token_rules,
    uniform_of,
)
from .token_counts import TokenCounts

__all__ = ["DeviceSampler", "SampledRows"]

_UNSEEN = -1


class DeviceSampler:
    """Owner of the memory that two steps are staged in. Engine thread."""

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._staging = (Staging(device), Staging(device))  # the device may still read the last

    def sample(
        self, logits: Tensor, requests: Sequence[Request], masks: NDArray[np.int32] | None
    ) -> list[Sampled]:
        """``sampler.sample`` for ``logits`` float32 [n, vocab_size] on the device."""
        return self.start(logits, requests, masks).wait()

    def start(
        self, logits: Tensor, requests: Sequence[Request], masks: NDArray[np.int32] | None
    ) -> SampledRows:
        """As ``sample``, but nobody waits yet. No third before the first has been waited for."""
        rows = [self._row(request, masks, i) for i, request in enumerate(requests)]
        batch, asking = self._batch(requests, rows)
        counts = [requests[i].source.sampling.logprobs or 0 for i in asking]
        logprob_rows = batch.logprob_rows.long()
        raw = logits[logprob_rows]  # before they are changed
        found = ids = sample_tokens(logits, batch)
        if asking:
            n_top = max(counts, default=0)
            found = torch.cat([ids, _logprobs(raw, ids[logprob_rows], n_top)])
        return SampledRows(ids, [row.error for row in rows], asking, counts, CopyBack(found))

    def prompt_logprobs_of(
        self, logits: Tensor, token_ids: Sequence[int], n_top: int
    ) -> list[TokenLogprobs]:
        """``sampler.prompt_logprobs_of`` for logits on the device."""
        n = len(token_ids)
        targets = torch.tensor(token_ids, dtype=torch.int32).to(self._device)
        own = logits.gather(1, targets.long().unsqueeze(1))
        ranks = (logits >= own).sum(-1, dtype=torch.int32)
        host = _to_host(torch.cat([ranks, _logprobs(logits, targets, n_top)])).numpy()
        found = _entries(host[n:], token_ids, [n_top] * n)
        return [
            replace(entry, rank=rank) for entry, rank in zip(found, host[:n].tolist(), strict=True)
        ]

    def _row(self, request: Request, masks: NDArray[np.int32] | None, row: int) -> _Row:
        try:
            rules = None
            if is_adjusted(request):
                rules = token_rules(request, self._eos_token_ids, self._vocab_size)
            forced = forced_token(request, -1)
            if forced >= 0 and rules is not None and forced in rules.banned:
                raise forbidden_by_bad_words()
            allowed = None
            if forced < 0:
                grammar = None if masks is None else masks[row]
                allowed = _allowed(request, rules, grammar, self._vocab_size)
            edits = _NO_EDITS if rules is None else _edits(request, rules)
            return _Row(forced, edits, allowed, None)
        except (NoTokenAllowed, GrammarTooComplex) as error:
            return _Row(0, _NO_EDITS, None, error)

    def _batch(
        self, requests: Sequence[Request], rows: Sequence[_Row]
    ) -> tuple[SamplingBatch, list[int]]:
        """What the rows ask for, on the device, and which ask for log-probabilities."""
        params = [r.source.sampling for r in requests]
        edits = [row.edits for row in rows]
        masked = [row.allowed for row in rows if row.allowed is not None]
        has_mask = [row.allowed is not None for row in rows]
        asking = [i for i, p in enumerate(params) if p.logprobs is not None]
        n_words = -(-self._vocab_size // 32)
        arrays = {
            "uniforms": [0.0 if r.source.sampling.greedy else uniform_of(r) for r in requests],
            "top_p": [p.top_p for p in params],
            "temperatures": [
                0.0 if p.greedy else max(p.temperature, MIN_TEMPERATURE) for p in params
            ],
            "min_weights": [least_weight(p) for p in params],
            "penalties": [
                (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params
            ],
            "top_k": [min(p.top_k, self._vocab_size) for p in params],  # int32 there
            "must_choose": [r.constraint is not None for r in requests],
            "forced": [row.forced for row in rows],
            "logprob_rows": asking,
            "edit_starts": np.cumsum([0, *(len(one.tokens) for one in edits)]),
            "edit_tokens": np.concatenate([one.tokens for one in edits]),
            "edit_biases": np.concatenate([one.biases for one in edits]),
            "edit_counts": np.concatenate([one.counts for one in edits]),
            "mask_rows": np.where(has_mask, np.cumsum(has_mask) - 1, -1),
            "masks": np.stack(masked) if masked else np.empty((0, n_words)),
        }
        known = {name: np.asarray(value) for name, value in arrays.items()}
        self._staging = self._staging[::-1]
        return pack_batch(known, self._device, self._staging[0]), asking


class SampledRows:
    """The tokens of a step: on the device at once, on the host once it has computed them."""

    def __init__(
        self,
        ids: Tensor,
        errors: Sequence[EngineError | None],
        asking: Sequence[int],  # rows that get log-probabilities
        n_top: Sequence[int],  # for each of these
        found: CopyBack,
    ) -> None:
        self.ids = ids  # int32 [n], −1 where no token has a probability
        self._errors, self._asking, self._n_top = errors, asking, n_top
        self._found = found

    def wait(self) -> list[Sampled]:
        """The one wait of a step. Raises what the device raises."""
        host = self._found.wait().numpy()
        n = len(self._errors)
        chosen: list[int] = host[:n].tolist()
        entries: list[TokenLogprobs | None] = [None] * n
        table = _entries(host[n:], [chosen[i] for i in self._asking], self._n_top)
        for i, entry in zip(self._asking, table, strict=True):
            entries[i] = entry
        return [
            Sampled(max(token, 0), entry, error or (no_token() if token < 0 else None))
            for token, entry, error in zip(chosen, entries, self._errors, strict=True)
        ]


class _Row(NamedTuple):
    """What the host decides of one row."""

    forced: int  # −1: the device decides
    edits: _Edits
    allowed: NDArray[np.int32] | None
    error: EngineError | None


class _Edits(NamedTuple):
    """Of one row, see ``SamplingBatch``; all [n]."""

    tokens: NDArray[np.int32]
    biases: NDArray[np.float32]
    counts: NDArray[np.int32]


_NO_EDITS = _Edits(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))


def _to_host(found: Tensor) -> Tensor:
    """A copy on the host; waits for the device."""
    return CopyBack(found).wait()


def _edits(request: Request, rules: TokenRules) -> _Edits:
    """Tokens whose logits change, each once."""
    params = request.source.sampling
    biases = dict(params.logit_bias) | dict.fromkeys(rules.forbidden, -math.inf)
    counts = _counts(request)
    places = {token: counts.place(token) for token in biases}
    others = [token for token, place in places.items() if place is None]
    known = np.zeros(len(counts.tokens), dtype=np.float32)
    for token, place in places.items():
        if place is not None:
            known[place] = biases[token]
    return _Edits(
        np.concatenate((counts.tokens, np.array(others, dtype=np.int32))),
        np.concatenate((known, np.array([biases[t] for t in others], dtype=np.float32))),
        np.concatenate((counts.counts, np.full(len(others), _UNSEEN, dtype=np.int32))),
    )


def _counts(request: Request) -> TokenCounts:
    """Of the request's tokens where a penalty reads them, else of none."""
    params = request.source.sampling
    if (
        params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
    ):
        return TokenCounts()
    if request.token_counts is None:
        request.token_counts = TokenCounts()
    request.token_counts.update(request.token_ids, request.n_prompt)
    return request.token_counts


def _allowed(
    request: Request, rules: TokenRules | None, grammar: NDArray[np.int32] | None, vocab_size: int
) -> NDArray[np.int32] | None:
    """int32 [ceil(vocab_size / 32)], the bits of tokens that may come; None: all may.

    Raises NoTokenAllowed and GrammarTooComplex.
    """
    listed = None
    if rules is not None and rules.kept is not None:
        listed = bits_of(rules.kept, vocab_size)
    if request.constraint is None:
        return listed
    assert grammar is not None
    if not grammar.any():
        raise dead_end(request.constraint)
    if rules is None:
        return grammar
    left = grammar & ~bits_of(rules.forbidden, vocab_size)
    if listed is not None:
        left &= listed
    if left.any():
        return left
    left = grammar & ~bits_of(rules.banned, vocab_size)
    if not left.any():
        raise forbidden_by_bad_words()
    # The fields forbid all that the grammar allows, as min_tokens do where the answer has to end.
    return bits_of([first_bit(left)], vocab_size)


def _logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> Tensor:
    """int32 [n · (1 + 2 n_top)]: the bits of the tokens' and of the most likely ones' log-
    probabilities, then the ids of those."""
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(-1, token_ids.long().clamp(min=0).unsqueeze(-1)) - norm
    values, ids = torch.topk(logits, n_top, dim=-1)
    floats = torch.cat([chosen.flatten(), (values - norm).flatten()])
    return torch.cat([floats.view(torch.int32), ids.flatten().to(torch.int32)])


def _entries(
    found: NDArray[np.int32], token_ids: Sequence[int], n_top: Sequence[int]
) -> list[TokenLogprobs]:
    """What ``_logprobs`` made, row by row."""
    n, k = len(token_ids), max(n_top, default=0)
    chosen = found[:n].view(np.float32).tolist()
    values = found[n : n * (1 + k)].view(np.float32).reshape(n, k).tolist()
    ids = found[n * (1 + k) :].reshape(n, k).tolist()
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:m], row_values[:m], strict=True)))
        for token, logprob, m, row_ids, row_values in zip(
            token_ids, chosen, n_top, ids, values, strict=True
        )
    ]
