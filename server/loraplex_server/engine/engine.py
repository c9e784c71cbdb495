"""The engine as other threads see it: requests go in, events come back."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from .adapter_packer import AdapterPacker
from .client import AdapterRef, EngineStats, GenerationRequest, Listener
from .engine_loop import EngineLoop
from .errors import ContextOverflow, EngineDraining
from .expert_monitor import ExpertMonitor
from .inbox import Inbox
from .messages import Cancel, FailAll, Reply, SetPinned, Stop, Unload, Warm
from .request import Request

__all__ = ["Engine"]

_DRAIN_POLL_S = 0.02


class Engine:
    """See ``client.EngineClient`` for the contract. Every method may be called on any thread.

    Threads meet in two places: the inbox, and the output router that calls back into event loops.
    """

    def __init__(
        self,
        loop: EngineLoop,
        inbox: Inbox,
        *,
        max_model_len: int,
        on_closed: Callable[[], object] | None = None,
    ) -> None:
        """``on_closed``: once the thread has stopped and nothing is loaded any more."""
        self.loop = loop
        self._on_closed = on_closed
        self._inbox = inbox
        self._max_model_len = max_model_len
        self._thread = threading.Thread(target=loop.run, name="loraplex-engine", daemon=True)

    def start(self) -> None:
        """Starts the engine thread, which keeps torch's compute threads. All other threads get one.

        Otherwise every worker thread of the HTTP side would have its own compute threads.
        """
        self._thread.start()
        self.loop.started.wait()
        torch.set_num_threads(1)

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        self._inbox.submit(self._new_request(request, listener))

    def cancel(self, request_id: str) -> None:
        self._inbox.post(Cancel(request_id))

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Keeps an adapter on the device once it is there, or lets it go again."""
        self._inbox.post(SetPinned(digest, pinned))

    def warm(self, adapter: AdapterRef) -> None:
        """Starts loading an adapter before anybody asks for it."""
        self._inbox.post(Warm(adapter.plan))

    async def unload(self, digest: str) -> int:
        """Frees an idle adapter's place on the device; returns the bytes. Waits for its load.

        0 if it is absent or in use, or if the engine has stopped. ``stats`` tells of it by then.
        """
        loop = asyncio.get_running_loop()
        freed: asyncio.Future[int] = loop.create_future()
        if not self._inbox.post(Unload(digest, Reply(loop, freed))):
            return 0
        return await freed

    @property
    def packer(self) -> AdapterPacker:
        """Makes the form in which adapters wait in host memory: placing them is then one copy."""
        return self.loop.adapters.packer

    @property
    def experts(self) -> ExpertMonitor:
        """How routed adapters use their experts."""
        return self.loop.experts

    def stats(self) -> EngineStats:
        return replace(self.loop.stats.latest, step_age_s=time.monotonic() - self.loop.heartbeat)

    def n_queued(self, tenant: str) -> int:
        return self._inbox.n_queued(tenant)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.loop.eos_token_ids

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def alive(self) -> bool:
        return self._inbox.closed is None and self._thread.is_alive()

    async def drain(self, timeout_s: float) -> bool:
        self._inbox.drain()
        deadline = time.monotonic() + timeout_s
        while self._inbox.n_requests and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        if not self._inbox.n_requests:
            return True
        self._inbox.post(FailAll(EngineDraining("the server went down")))
        while self._inbox.n_requests and self.alive:
            await asyncio.sleep(_DRAIN_POLL_S)
        return False

    def close(self) -> None:
        """Stops the thread; requests that still run get a final error event."""
        self._inbox.post(Stop())
        self._thread.join()
        self.loop.adapters.close()
        if self._on_closed is not None:
            self._on_closed()

    def _new_request(self, source: GenerationRequest, listener: Listener) -> Request:
        """Raises ContextOverflow if the request can never run."""
        prefix = None if source.adapter is None else source.adapter.plan.prefix
        n_virtual = 0 if prefix is None else prefix.n_virtual
        token_ids = [-1 - index for index in range(n_virtual)] + list(source.prompt_ids)
        if not source.prompt_ids:
            raise ContextOverflow("the prompt is empty; send at least one token")
        n_generated = 1 if source.pooling is None else 0  # at least
        if len(token_ids) + n_generated > self._max_model_len:
            also = " with at least one to generate" if n_generated else ""
            raise ContextOverflow(
                f"the prompt has {len(token_ids)} tokens, the context holds {self._max_model_len}"
                f"{also}; shorten the prompt or raise --max-model-len"
            )
        seed = source.sampling.seed
        return Request(
            source=source,
            listener=listener,
            loop=asyncio.get_running_loop(),
            token_ids=token_ids,
            n_prompt=len(token_ids),
            n_virtual=n_virtual,
            seed=secrets.randbits(63) if seed is None else seed,
        )
