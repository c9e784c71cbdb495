"""An EngineClient with scripted answers, without a model or a thread."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loraplex_server.engine.errors import (
    ContextOverflow,
    EngineDead,
    EngineDraining,
    EngineError,
    QueueFull,
)
from loraplex_server.engine.requests.client import EngineStats, GenerationRequest, Listener
from loraplex_server.engine.requests.events import FinishReason, TokenEvent, TokenLogprobs
from loraplex_server.engine.requests.pooling import PooledRows, Pooling

EOS_ID = 2
Script = Callable[[GenerationRequest], Sequence[int]]


@dataclass
class _Run:
    request: GenerationRequest
    listener: Listener
    loop: asyncio.AbstractEventLoop
    script: list[int]
    n_sent: int = 0


@dataclass
class FakeEngine:
    """An engine that answers each request with ``script(request)`` and then the end token.

    One token per turn of the event loop, or, when ``manual``, one for each ``step()``.
    """

    tokenizer: Tokenizer
    answer: str | Script = "Hello, wörld! 😀 fine"
    max_model_len: int = 256
    max_queue: int = 8
    refuses_later: bool = False  # a full queue is a last event, as where the engine is elsewhere
    manual: bool = False
    n_cached: int = 0
    alive: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    current: EngineStats = field(default_factory=EngineStats)
    draining: bool = False
    queued: dict[str, int] = field(default_factory=dict)  # by tenant
    _running: dict[str, _Run] = field(default_factory=dict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset({EOS_ID})

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        if not self.alive:
            raise EngineDead("the engine thread stopped")
        if self.draining:
            raise EngineDraining("the server is shutting down")
        if len(self._running) >= self.max_queue:
            full = QueueFull("the queue is full", 1.5)
            if not self.refuses_later:
                raise full
            event = TokenEvent(request.request_id, (), finish=FinishReason.ERROR, error=full)
            asyncio.get_running_loop().call_soon(listener, event)
            return
        if len(request.prompt_ids) >= self.max_model_len:
            raise ContextOverflow("the prompt is too long")
        loop = asyncio.get_running_loop()
        self.requests.append(request)
        run = _Run(request, listener, loop, self._script(request))
        self._running[request.request_id] = run
        self._arrived.set()
        if not self.manual:
            loop.call_soon(self._advance, request.request_id)

    def cancel(self, request_id: str) -> None:
        run = self._running.pop(request_id, None)
        if run is not None:
            self.cancelled.append(request_id)
            event = TokenEvent(request_id, (), finish=FinishReason.CANCELLED)
            run.loop.call_soon(run.listener, event)

    def stats(self) -> EngineStats:
        return replace(self.current, n_running=len(self._running))

    def n_queued(self, tenant: str) -> int:
        return self.queued.get(tenant, 0)

    async def drain(self, timeout_s: float) -> bool:
        self.draining = True
        if not self._running:
            return True
        self.fail(EngineDraining("the server went down"))
        return False

    # For tests.

    def reset(self) -> None:
        """Forget all requests, and answer as a new engine does."""
        vars(self).update(vars(FakeEngine(self.tokenizer)))

    @property
    def n_running(self) -> int:
        return len(self._running)

    async def arrival(self, n_requests: int = 1) -> None:
        """Wait until ``n`` requests were submitted."""
        while len(self.requests) < n_requests:
            self._arrived.clear()
            await self._arrived.wait()

    def step(self, *request_ids: str) -> None:
        """Send one token to each running request, or only to the named ones."""
        for request_id in request_ids or list(self._running):
            self._send(self._running[request_id])

    def fail(self, error: EngineError) -> None:
        """End every running request with ``error``."""
        for request_id, run in list(self._running.items()):
            del self._running[request_id]
            run.listener(TokenEvent(request_id, (), finish=FinishReason.ERROR, error=error))

    def die(self) -> None:
        self.alive = False
        self.fail(EngineDead("the engine thread stopped"))

    def _script(self, request: GenerationRequest) -> list[int]:
        if callable(self.answer):
            return list(self.answer(request))
        return list(self.tokenizer.encode(self.answer, add_special_tokens=False).ids)

    def _advance(self, request_id: str) -> None:
        run = self._running.get(request_id)
        if run is not None:
            self._send(run)
            run.loop.call_soon(self._advance, request_id)

    def _send(self, run: _Run) -> None:
        request, sampling = run.request, run.request.sampling
        if request.pooling is not None:
            del self._running[request.request_id]
            finish = FinishReason.STOP
            pooled = _pooled(request, request.pooling)
            run.listener(TokenEvent(request.request_id, (), finish=finish, pooled=pooled))
            return
        first = run.n_sent == 0
        at_end = run.n_sent >= len(run.script)
        token_id = EOS_ID if at_end else run.script[run.n_sent]
        if sampling.ignore_eos and at_end:
            token_id = run.script[run.n_sent % len(run.script)]
        stops = token_id in sampling.stop_token_ids or (
            token_id == EOS_ID and not sampling.ignore_eos
        )
        if stops:
            event = TokenEvent(request.request_id, (), finish=FinishReason.STOP)
            event = replace(event, stop_token=token_id)
        else:
            run.n_sent += 1
            full = run.n_sent >= sampling.max_tokens
            finish = FinishReason.LENGTH if full else None
            event = TokenEvent(request.request_id, (token_id,), finish=finish)
        event = replace(event, logprobs=self._logprobs(request, token_id))
        if first:
            prompt = _prompt_logprobs(request, sampling.prompt_logprobs)
            event = replace(event, n_cached=self.n_cached, queue_s=0.25, prompt_logprobs=prompt)
        if event.finish is not None:
            del self._running[request.request_id]
        run.listener(event)

    def _logprobs(self, request: GenerationRequest, token_id: int) -> tuple[TokenLogprobs, ...]:
        k = request.sampling.logprobs
        return () if k is None else (_made_up(token_id, k),)


def _made_up(token_id: int, k: int) -> TokenLogprobs:
    others = [(i, -1.0 - i) for i in range(3, 3 + k) if i != token_id]
    return TokenLogprobs(token_id, -0.5, tuple([(token_id, -0.5), *others][:k]), rank=1)


def _prompt_logprobs(request: GenerationRequest, k: int | None) -> tuple[TokenLogprobs | None, ...]:
    if k is None:
        return ()
    return (None, *(_made_up(token_id, k) for token_id in request.prompt_ids[1:]))


_WIDTH = 64  # of the tiny models' hidden states


def _pooled(request: GenerationRequest, pooling: Pooling) -> Tensor:
    """Pool made-up hidden states, one for each token id."""
    rows = PooledRows(pooling)
    for token in request.prompt_ids:
        rows.add(torch.sin(torch.arange(1, _WIDTH + 1.0) * (token + 1)).unsqueeze(0))
    return rows.result()
