"""A request inside the engine: its tokens, status and times."""

from __future__ import annotations

import asyncio
import copy
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from loraplex_server.model.vision.prompt_image import Block
from loraplex_server.model.vision.rope_positions import RopePositions

from .client import GenerationRequest, Listener
from .events import TokenLogprobs
from .grammar import CompiledGrammar
from .guesses import Guesses
from .pooling import PooledRows


class Constraint:
    """A grammar that advances with the request's tokens. Engine thread; TokenMasks reads it.

    tokens of the answer: [known to the request | forced, still to come]
    ``matcher`` has consumed both.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.matcher: LLMatcher = grammar.matcher.deep_copy()
        self._forced: deque[int] = deque()
        self._look_ahead()

    @property
    def forced(self) -> int | None:
        """The next token if the grammar forces it; None if it has to be sampled."""
        return self._forced[0] if self._forced else None

    @property
    def ended(self) -> bool:
        """Return True if only an end token can follow."""
        return not self._forced and self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """The reason why the grammar stopped early: too complex a step, or no token allowed."""
        if not self.matcher.is_error():
            return None
        return str(self.matcher.get_error()).strip().partition("\n")[0]

    def upcoming(self) -> list[int]:
        """Return the forced tokens that the request does not know."""
        return list(self._forced)

    def copy(self) -> Constraint:
        """Return a constraint that advances on its own."""
        other = copy.copy(self)
        other.matcher, other._forced = self.matcher.deep_copy(), self._forced.copy()
        return other

    def allows(self, token_id: int) -> bool:
        """Return True if the token may be the answer's next one."""
        if self._forced:
            return token_id == self._forced[0]
        return not self.ended and self.matcher.validate_tokens([token_id]) == 1

    def accept(self, token_id: int) -> None:
        """Consumes the answer's next token, sampled under the mask or forced."""
        if self._forced:
            assert token_id == self._forced[0]
            self._forced.popleft()
        else:
            self.matcher.consume_token(token_id)
        self._look_ahead()

    def take_forced(self, n_most: int, stop_token_ids: frozenset[int]) -> list[int]:
        """Consume and return up to ``n_most`` forced tokens, up to the first stop token."""
        taken: list[int] = []
        while self._forced and len(taken) < n_most and self._forced[0] not in stop_token_ids:
            taken.append(self._forced.popleft())
        return taken

    def _look_ahead(self) -> None:
        if self._forced or self.matcher.is_stopped():
            return
        forced = self.matcher.compute_ff_tokens()
        if forced and self.matcher.consume_tokens(forced):
            self._forced.extend(forced)


class TokenCounts:
    """Token counts of one request. An update costs only the new tokens. Engine thread."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}  # of a token in the arrays
        self._tokens: NDArray[np.int32] = np.empty(64, dtype=np.int32)
        self._counts: NDArray[np.int32] = np.empty(64, dtype=np.int32)
        self._n_known = 0

    def copy(self) -> TokenCounts:
        """Return counts that grow on their own."""
        other = copy.copy(self)
        other._index = self._index.copy()
        other._tokens, other._counts = self._tokens.copy(), self._counts.copy()
        return other

    def update(self, token_ids: list[int], n_prompt: int) -> None:
        """Counts the new tokens. ``token_ids`` is [virtual | prompt | output] and only grows."""
        for position in range(self._n_known, len(token_ids)):
            if token_ids[position] >= 0:
                index = self._index_of(token_ids[position])  # may reallocate the arrays
                self._counts[index] += position >= n_prompt
        self._n_known = len(token_ids)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The distinct tokens, [n]."""
        return self._tokens[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.int32]:
        """The count of each token in the output, [n]; 0 for tokens of the prompt alone."""
        return self._counts[: len(self._index)]

    def index(self, token_id: int) -> int | None:
        """Return the token's index in ``tokens``; None if it is not there."""
        return self._index.get(token_id)

    def _index_of(self, token_id: int) -> int:
        index = self._index.get(token_id)
        if index is None:
            index = self._index[token_id] = len(self._index)
            if index == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, self._tokens))
                self._counts = np.concatenate((self._counts, self._counts))
            self._tokens[index], self._counts[index] = token_id, 0
        return index


class RequestStatus(Enum):
    WAITING = "waiting"  # queued, or preempted and queued again
    RUNNING = "running"  # holds KV pages; prefilling until all known tokens are computed
    FINISHED = "finished"


def invoked_at(prompt_ids: Sequence[int], invocation: Sequence[int]) -> int:
    """Return where ``invocation`` stands last in the prompt, or a position beyond every context."""
    wanted = tuple(invocation)
    for start in range(len(prompt_ids) - len(wanted), -1, -1):
        if tuple(prompt_ids[start : start + len(wanted)]) == wanted:
            return start
    return sys.maxsize


_MOVES = {
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {RequestStatus.WAITING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class Request:
    """A mutable request. Owned by the scheduler, on the engine thread.

    ``token_ids`` is [virtual | prompt | output]. Virtual tokens are the adapter's prefix and have
    negative ids. Tokens [0, n_computed) have KV, those before ``adapter_from`` the base's.
    """

    source: GenerationRequest
    listener: Listener
    token_ids: list[int]
    n_prompt: int  # virtual tokens included
    loop: asyncio.AbstractEventLoop | None = None  # of the listener; None discards the events
    n_virtual: int = 0
    adapter_from: int = 0  # the first position whose token uses the adapter
    n_computed: int = 0
    n_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    status: RequestStatus = RequestStatus.WAITING
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    n_preempted: int = 0
    n_bypassed: int = 0  # admissions of later requests while this one waited for its adapter
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # computed so far
    pooled: PooledRows | None = None  # set while a request for vectors runs
    n_charged: int = 0  # tokens of the answer that the tenant's counter includes
    last_step: int = 0  # the number of the last step that computed tokens of it
    n_steps_queued: int = 0  # before admission: −(step of arrival); afterwards: steps waited
    seed: int = 0  # seed of the sampler; random unless the client set one
    constraint: Constraint | None = None  # state of the grammar
    token_counts: TokenCounts | None = None  # for penalties of the device sampler
    has_placeholder: bool = False  # the last token is still being computed
    is_full: bool = False  # the placeholder is the last token of the answer
    n_sent: int = 0  # tokens of the output that were sent
    prompt_key_ids: list[int] | None = None  # in place of a prompt with images, in ``key_ids``
    rope: RopePositions | None = None  # of images whose positions have axes
    blocks: tuple[Block, ...] = ()  # ascending; virtual tokens count
    guesses: Guesses | None = None  # source of drafts
    n_drafted: int = 0  # drafts that steps verified
    n_accepted: int = 0  # drafts that became tokens of the answer

    @property
    def id(self) -> str:
        return self.source.request_id

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def n_output(self) -> int:
        return len(self.token_ids) - self.n_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.n_prompt :]

    @property
    def key_ids(self) -> list[int]:
        """Return the numbers that keys of KV pages are made of: those of the tokens and images."""
        if self.prompt_key_ids is None:
            return self.token_ids
        return self.prompt_key_ids + self.token_ids[self.n_prompt :]

    @property
    def adapter_digest(self) -> str:
        """Empty for the base model."""
        return "" if self.source.adapter is None else self.source.adapter.digest

    def digest_at(self, position: int) -> str:
        """Return the digest of the adapter that computes this position; empty for the base."""
        return self.adapter_digest if position >= self.adapter_from else ""

    @property
    def sampling_digest(self) -> str:
        """Return the digest of the adapter that the next token is sampled with."""
        return self.digest_at(self.n_tokens - 1)

    def n_together(self, start: int) -> int:
        """Return how many tokens from ``start`` on one chunk can hold.

        A chunk is computed with one adapter, so it ends where an activated adapter begins.
        """
        end = self.n_tokens if start >= self.adapter_from else self.adapter_from
        return min(end, self.n_tokens) - start

    def without_cut(self, start: int, n_tokens: int) -> int:
        """Return the number of tokens, near ``n_tokens``, of a chunk that divides no block.

        The chunk ends before a block that it cannot hold. If it starts with that block, it has the
        whole block, and thus more than ``n_tokens``. 0 stays 0.
        """
        for first, end, _ in self.blocks if n_tokens else ():
            if first < start + n_tokens < end:
                return first - start if first > start else end - start
        return n_tokens

    @property
    def queue_s(self) -> float:
        return 0.0 if self.admitted_at is None else self.admitted_at - self.submitted_at

    def after(self, token_ids: Sequence[int], constraint: Constraint | None) -> Request:
        """Return the request as it is once ``token_ids`` follow, to sample the next token from.

        ``constraint`` has accepted these tokens.
        """
        counts = None if self.token_counts is None else self.token_counts.copy()
        return replace(
            self,
            token_ids=[*self.token_ids, *token_ids],
            constraint=constraint,
            token_counts=counts,
        )

    def add_placeholder(self, *, is_full: bool) -> None:
        """Appends 0 in place of the token that the running step computes."""
        self.token_ids.append(0)
        self.has_placeholder, self.is_full = True, is_full

    def remove_placeholder(self) -> None:
        """Removes the placeholder, before the computed token is appended or after a failure."""
        if self.has_placeholder:
            self.token_ids.pop()
            self.has_placeholder = self.is_full = False

    def advance(self, status: RequestStatus) -> None:
        """Changes the status and stamps the first admission. Raises for a wrong transition."""
        if status not in _MOVES[self.status]:
            raise RuntimeError(f"request {self.id} cannot go from {self.status} to {status}")
        if status is RequestStatus.RUNNING and self.admitted_at is None:
            self.admitted_at = time.monotonic()
        self.status = status
