"""Samples the tokens of a step on the device of its logits.

A row's token depends only on its own logits, parameters, seed and output length, so a seeded
request gives the same tokens in every batch. One uniform number per (seed, output position) inverts
the cumulative distribution over the tokens in order: largest logit first, equal ones by id.
``loraplex_kernels.formats.sampling_batch`` defines the arithmetic, the same on every device.

On a GPU a step takes one copy to the device (parameters, penalised tokens, masks), three launches,
and one copy back through pinned memory (ids, and log-probabilities for the rows that ask for them).
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

from loraplex_kernels.cpu.token_mask import bits_of, first_bit
from loraplex_kernels.formats.sampling_batch import SamplingBatch, pack_batch
from loraplex_kernels.layers.sampling import sample_tokens
from loraplex_server.engine.errors import EngineError, GrammarTooComplex, NoTokenAllowed
from loraplex_server.engine.memory.copy_stream import CopyBack
from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.engine.requests.request import Request, TokenCounts
from loraplex_server.engine.requests.sampling_params import SamplingParams

from .token_rules import (
    TokenRules,
    dead_end,
    forbidden_by_bad_words,
    forced_token,
    is_adjusted,
    no_token,
    token_rules,
)

# A smaller temperature would overflow in the softmax and changes no answer.
MIN_TEMPERATURE = 1e-6

_UNSEEN = -1


@dataclass(frozen=True, slots=True)
class Sampled:
    """A new token of a request."""

    token_id: int
    logprobs: TokenLogprobs | None
    error: EngineError | None = None  # the request has no token and ends with this error


class Sampler:
    """The engine thread's."""

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device

    def start(
        self, logits: Tensor, requests: Sequence[Request], masks: NDArray[np.int32] | None
    ) -> SampledRows:
        """Launch the sampling of a token for each request.

        Row i of ``logits`` float32 [n, vocab_size] belongs to ``requests[i]``; all are changed in
        place. ``masks`` are the tokens that grammars allow, see ``TokenMasks.wait``.
        """
        rows = [self._row(request, masks, i) for i, request in enumerate(requests)]
        batch, asking = self._batch(requests, rows)
        counts = [requests[i].source.sampling.logprobs or 0 for i in asking]
        logprob_rows = batch.logprob_rows.long()
        raw = logits[logprob_rows]  # ``sample_tokens`` changes the logits
        output = ids = sample_tokens(logits, batch)
        if asking:
            n_top = max(counts, default=0)
            output = torch.cat([ids, _logprobs(raw, ids[logprob_rows], n_top)])
        return SampledRows(ids, [row.error for row in rows], asking, counts, CopyBack(output))

    def prompt_logprobs_of(
        self, logits: Tensor, token_ids: Sequence[int], n_top: int
    ) -> list[TokenLogprobs]:
        """Return the log-probabilities and ranks of these tokens and of ``n_top`` most likely ones.

        ``logits`` float32 [n, vocab_size]. Rank 1 is the most likely. Waits for the device.
        """
        n = len(token_ids)
        targets = torch.tensor(token_ids, dtype=torch.int32).to(self._device)
        own = logits.gather(1, targets.long().unsqueeze(1))
        ranks = (logits >= own).sum(-1, dtype=torch.int32)
        host = CopyBack(torch.cat([ranks, _logprobs(logits, targets, n_top)])).wait().numpy()
        entries = _entries(host[n:], token_ids, [n_top] * n)
        return [replace(e, rank=rank) for e, rank in zip(entries, host[:n].tolist(), strict=True)]

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
        """Return the parameters on the device, and the rows that ask for log-probabilities."""
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
            "edit_starts": np.cumsum([0, *(len(edit.tokens) for edit in edits)]),
            "edit_tokens": np.concatenate([edit.tokens for edit in edits]),
            "edit_biases": np.concatenate([edit.biases for edit in edits]),
            "edit_counts": np.concatenate([edit.counts for edit in edits]),
            "mask_rows": np.where(has_mask, np.cumsum(has_mask) - 1, -1),
            "masks": np.stack(masked) if masked else np.empty((0, n_words)),
        }
        named = {name: np.asarray(value) for name, value in arrays.items()}
        return pack_batch(named, self._device), asking


class SampledRows:
    """The tokens of a step, on the device at once and on the host after ``wait``."""

    def __init__(
        self,
        ids: Tensor,
        errors: Sequence[EngineError | None],
        asking: Sequence[int],  # rows that get log-probabilities
        n_top: Sequence[int],  # for each of these rows
        output: CopyBack,
    ) -> None:
        self.ids = ids  # int32 [n], −1 where no token has a probability
        self._errors, self._asking, self._n_top = errors, asking, n_top
        self._output = output

    def wait(self) -> list[Sampled]:
        """Wait for the step and return its tokens. Raises the device's errors."""
        host = self._output.wait().numpy()
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
    """The host's decisions about one row."""

    forced: int  # −1: the device decides
    edits: _Edits
    allowed: NDArray[np.int32] | None
    error: EngineError | None


class _Edits(NamedTuple):
    """Changes of one row's logits, see ``SamplingBatch``; all [n]."""

    tokens: NDArray[np.int32]
    biases: NDArray[np.float32]
    counts: NDArray[np.int32]


_NO_EDITS = _Edits(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))


def _edits(request: Request, rules: TokenRules) -> _Edits:
    """Return the tokens whose logits change, each once."""
    params = request.source.sampling
    biases = dict(params.logit_bias) | dict.fromkeys(rules.forbidden, -math.inf)
    counts = _counts(request)
    indices = {token: counts.index(token) for token in biases}
    others = [token for token, index in indices.items() if index is None]
    counted = np.zeros(len(counts.tokens), dtype=np.float32)
    for token, index in indices.items():
        if index is not None:
            counted[index] = biases[token]
    return _Edits(
        np.concatenate((counts.tokens, np.array(others, dtype=np.int32))),
        np.concatenate((counted, np.array([biases[t] for t in others], dtype=np.float32))),
        np.concatenate((counts.counts, np.full(len(others), _UNSEEN, dtype=np.int32))),
    )


def _counts(request: Request) -> TokenCounts:
    """Return the counts of the request's tokens; empty if it has no penalty."""
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
    """Return the mask of allowed tokens, int32 [ceil(vocab_size / 32)]; None allows all.

    Raises NoTokenAllowed and GrammarTooComplex.
    """
    listed = None
    if rules is not None and rules.allowed is not None:
        listed = bits_of(rules.allowed, vocab_size)
    if request.constraint is None:
        return listed
    assert grammar is not None
    if not grammar.any():
        raise dead_end(request.constraint)
    if rules is None:
        return grammar
    allowed = grammar & ~bits_of(rules.forbidden, vocab_size)
    if listed is not None:
        allowed &= listed
    if allowed.any():
        return allowed
    allowed = grammar & ~bits_of(rules.banned, vocab_size)
    if not allowed.any():
        raise forbidden_by_bad_words()
    # The fields forbid all that the grammar allows: min_tokens do where the answer has to end.
    return bits_of([first_bit(allowed)], vocab_size)


def _logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> Tensor:
    """Return int32 [n · (1 + 2 n_top)]: the bits of the tokens' log-probabilities, those of the
    most likely tokens, and the ids of the most likely tokens."""
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(-1, token_ids.long().clamp(min=0).unsqueeze(-1)) - norm
    values, ids = torch.topk(logits, n_top, dim=-1)
    floats = torch.cat([chosen.flatten(), (values - norm).flatten()])
    return torch.cat([floats.view(torch.int32), ids.flatten().to(torch.int32)])


def _entries(
    packed: NDArray[np.int32], token_ids: Sequence[int], n_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Unpack the output of ``_logprobs``, row by row."""
    n, k = len(token_ids), max(n_top, default=0)
    chosen = packed[:n].view(np.float32).tolist()
    values = packed[n : n * (1 + k)].view(np.float32).reshape(n, k).tolist()
    ids = packed[n * (1 + k) :].reshape(n, k).tolist()
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:m], row_values[:m], strict=True)))
        for token, logprob, m, row_ids, row_values in zip(
            token_ids, chosen, n_top, ids, values, strict=True
        )
    ]


def least_weight(params: SamplingParams) -> np.float32:
    """Return ``min_p`` as float32, rounded up. The largest logit has weight 1."""
    least = np.float32(params.min_p)
    return least if float(least) >= params.min_p else np.nextafter(least, np.float32(np.inf))


def uniform_of(request: Request) -> float:
    """Return a number in [0, 1) that depends only on the seed and the output position."""
    key = f"{request.seed}:{request.n_output}".encode()
    word = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (word >> 11) * 2.0**-53
