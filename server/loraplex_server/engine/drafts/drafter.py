"""Adds drafts to the steps of few requests: tokens that probably come next, verified together.

    known tokens │ drafts            rows of one chunk, over one table of KV pages
      …  a  b    │  c  d  e          guesses of what follows
            │       │  │  │
            c       d  x  ·          sampled as without drafts: each row from its own state
                                     c and d were right, x replaces e: three tokens in one step

Each row is sampled with the seed, penalties and grammar of its own position, and a draft counts
only if it is the sampled token. So an answer has the same tokens with and without drafts. KV of
refused drafts lies behind the request's last token, and the next step writes over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.engine.requests.guesses import Guesses
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.sampling.token_rules import is_adjusted
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk

from .row_cost import MAX_ROWS, RowCost

_MAX_REQUESTS = 8  # of a step with drafts
_LEAST_GAIN = 1.02  # tokens per second with drafts, relative to those without
_FORCED_RATE = 0.99  # of tokens that a grammar forces


class Drafter:
    """Engine thread only."""

    def __init__(
        self, kv_cache: KvCache, n_left: Callable[[Request], int], *, max_step_tokens: int
    ) -> None:
        """``n_left``: how many more tokens an answer may get."""
        self._kv = kv_cache
        self._n_left = n_left
        self._max_rows = min(MAX_ROWS, max_step_tokens)
        self._cost = RowCost()

    def add(self, chunks: Sequence[ScheduledChunk]) -> Sequence[ScheduledChunk]:
        """Return the step's chunks with as many drafts as are expected to pay, if any."""
        if not _is_decode_step(chunks) or not self._cost.knows(_key(chunks)):
            return chunks
        candidates = [self._candidates(chunk.request) for chunk in chunks]
        rates = [_rate(chunk.request) for chunk in chunks]
        lengths = self._lengths(len(chunks), rates, [len(each) for each in candidates])
        drafted = []
        for chunk, tokens, n in zip(chunks, candidates, lengths, strict=True):
            if tokens and not n and chunk.request.guesses is not None:
                chunk.request.guesses.rest()
            drafted.append(self._with_drafts(chunk, tokens[:n]) if n else chunk)
        return drafted

    def measured(self, chunks: Sequence[ScheduledChunk], seconds: float) -> None:
        """Learns what rows cost from a finished step."""
        if _is_decode_step(chunks):
            n_rows = sum(chunk.n_rows for chunk in chunks)
            self._cost.measured(_key(chunks), n_rows, n_rows - len(chunks), seconds)

    def _candidates(self, request: Request) -> list[int]:
        """Return tokens that may come next, the likeliest first at each position."""
        # The last token of an answer is not computed.
        n_most = min(self._max_rows, self._n_left(request)) - 1
        if not request.source.drafts or n_most < 1:
            return []
        if request.constraint is not None and request.constraint.forced is not None:
            return request.constraint.upcoming()[:n_most]
        if request.guesses is None:
            prompt = request.token_ids[: request.n_prompt]
            request.guesses = Guesses(request.source.prediction_ids, prompt)
        return request.guesses.read(request.token_ids, n_most)

    def _lengths(
        self, n_requests: int, rates: Sequence[float], n_most: Sequence[int]
    ) -> Sequence[int]:
        """Return how many drafts of each request give the most tokens per second."""
        lengths = [0] * n_requests
        best, best_speed = list(lengths), _LEAST_GAIN * n_requests / self._cost.of(n_requests)
        n_expected = float(n_requests)
        for n_rows in range(n_requests + 1, self._max_rows + 1):
            gains = [
                rate ** (n + 1) if n < most else 0.0
                for rate, n, most in zip(rates, lengths, n_most, strict=True)
            ]
            gain = max(gains)
            if not gain:
                break
            lengths[gains.index(gain)] += 1
            n_expected += gain
            speed = n_expected / self._cost.of(n_rows)
            if speed > best_speed:
                best, best_speed = list(lengths), speed
        return best

    def _with_drafts(self, chunk: ScheduledChunk, tokens: Sequence[int]) -> ScheduledChunk:
        request = chunk.request
        drafts, ahead = _states(request, tokens)
        if not drafts or not self._kv.extend(request.id, request.n_tokens + len(drafts)):
            return chunk
        return replace(chunk, drafts=tuple(drafts), ahead=tuple(ahead))


def _is_decode_step(chunks: Sequence[ScheduledChunk]) -> bool:
    return 0 < len(chunks) <= _MAX_REQUESTS and all(
        chunk.samples and chunk.n_tokens == 1 and chunk.request.source.pooling is None
        for chunk in chunks
    )


def _key(chunks: Sequence[ScheduledChunk]) -> tuple[str, ...]:
    return tuple(chunk.request.id for chunk in chunks)


def _rate(request: Request) -> float:
    if request.constraint is not None and request.constraint.forced is not None:
        return _FORCED_RATE
    return 0.0 if request.guesses is None else request.guesses.rate


def _states(request: Request, tokens: Sequence[int]) -> tuple[list[int], list[Request]]:
    """Return the drafts that the grammar allows, and the state of the request after each."""
    constraint = request.constraint
    if constraint is None and request.source.sampling.greedy and not is_adjusted(request):
        return list(tokens), [request] * len(tokens)  # its rows depend on their logits alone
    drafts: list[int] = []
    states: list[Request] = []
    for token in tokens:
        if constraint is not None:
            if not constraint.allows(token):
                break
            constraint = constraint.copy()
            constraint.accept(token)
            if constraint.ended or constraint.error is not None:
                break  # no token follows
        drafts.append(token)
        states.append(request.after(drafts, constraint))
    return drafts, states
