"""A request inside the engine: its tokens, its life cycle, its clock."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum

from .client import GenerationRequest, Listener
from .constraint import Constraint
from .events import TokenLogprobs
from .pooling import PooledRows
from .token_counts import TokenCounts

__all__ = ["Request", "RequestStatus"]


class RequestStatus(Enum):
    WAITING = "waiting"  # queued, or preempted and queued again
    RUNNING = "running"  # holds KV pages; prefilling until all known tokens are computed
    FINISHED = "finished"


_MOVES = {
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {RequestStatus.WAITING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class Request:
    """Mutable; owned by the scheduler, on the engine thread.

    ``token_ids`` is [virtual | prompt | output]. Virtual tokens are the adapter's prefix; they are
    negative ids that no vocabulary holds. Indices: [0, n_computed) have KV | the rest waits.
    """

    source: GenerationRequest
    listener: Listener
    token_ids: list[int]
    n_prompt: int  # virtual tokens included
    loop: asyncio.AbstractEventLoop | None = None  # that the listener runs on; None: nobody hears
    n_virtual: int = 0
    n_computed: int = 0
    n_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    status: RequestStatus = RequestStatus.WAITING
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    n_preempted: int = 0
    n_bypassed: int = 0  # admissions of later requests while this one waited for its adapter
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # found so far
    pooled: PooledRows | None = None  # of a request for vectors, once it runs
    n_charged: int = 0  # tokens of its answer that its tenant's counter knows of
    n_steps_queued: int = 0  # until its first admission; before that, less the steps at its arrival
    seed: int = 0  # of the sampler; drawn once when the client gave none
    constraint: Constraint | None = None  # where the output stands in its grammar
    token_counts: TokenCounts | None = None  # for penalties, where a device samples
    expects_token: bool = False  # the last of ``token_ids`` stands for one that is being computed
    is_full: bool = False  # with the token that it expects: no further one will be wanted
    n_sent: int = 0  # tokens of the output that the listener got

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
    def adapter_digest(self) -> str:
        """Empty for the base model."""
        return "" if self.source.adapter is None else self.source.adapter.digest

    @property
    def queue_s(self) -> float:
        return 0.0 if self.admitted_at is None else self.admitted_at - self.submitted_at

    def expect_token(self, *, is_full: bool) -> None:
        """A step that runs will find a token; until then 0 stands in its place."""
        self.token_ids.append(0)
        self.expects_token, self.is_full = True, is_full

    def settle_token(self) -> None:
        """It was found, or will not be: there is no stand-in any more."""
        if self.expects_token:
            self.token_ids.pop()
            self.expects_token = self.is_full = False

    def advance(self, status: RequestStatus) -> None:
        """Checks the move and stamps the first admission."""
        if status not in _MOVES[self.status]:
            raise RuntimeError(f"request {self.id} cannot go from {self.status} to {status}")
        if status is RequestStatus.RUNNING and self.admitted_at is None:
            self.admitted_at = time.monotonic()
        self.status = status
