"""The engine as other threads see it: requests go in, events come back."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_server.model.vision.prompt_image import blocks_of, prefix_key_ids
from loraplex_server.model.vision.rope_positions import rope_positions

from .adapters.adapter_packer import AdapterPacker
from .adapters.expert_monitor import ExpertMonitor
from .engine_loop import EngineLoop
from .errors import ContextOverflow, EngineDraining
from .requests.client import EngineStats, GenerationRequest, Listener
from .requests.inbox import Inbox, Unload
from .requests.request import Request, invoked_at

_DRAIN_POLL_S = 0.02


class Engine:
    """See ``client.EngineClient`` for the contract. Every method may be called on any thread.

    Threads meet in two places: the inbox, and the output router that calls back into event loops.
    """

    def __init__(
        self,
        loop: EngineLoop,
        inbox: Inbox,
        on_closed: Callable[[], object] | None = None,
    ) -> None:
        """``on_closed`` is called once the thread and the loader have stopped."""
        self.loop = loop
        self._on_closed = on_closed
        self._inbox = inbox
        self._thread = threading.Thread(target=loop.run, name="loraplex-engine", daemon=True)

    def start(self) -> None:
        """Starts the engine thread, and limits torch to one compute thread in all other threads.

        Otherwise every worker thread of the HTTP side would start a full set of compute threads.
        """
        self._thread.start()
        self.loop.started.wait()
        torch.set_num_threads(1)

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        self._inbox.submit(self._new_request(request, listener))

    def cancel(self, request_id: str) -> None:
        self._inbox.post(partial(self.loop.outputs.cancel, request_id))

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Starts or ends the protection of an adapter from eviction once it is resident."""
        self._inbox.post(partial(self.loop.adapters.set_pinned, digest, pinned))

    def warm(self, adapter: AdapterLease) -> None:
        """Starts loading an adapter before a request needs it."""
        self._inbox.post(partial(self.loop.adapters.warm, adapter.plan))

    async def unload(self, digest: str) -> int:
        """Unloads an idle adapter from the device and returns the freed bytes. Waits for its load.

        Returns 0 if the adapter is absent or in use, or if the engine has stopped. ``stats`` shows
        the result by then.
        """
        unload = Unload(digest, Future())
        return await asyncio.wrap_future(unload.freed) if self._inbox.post(unload) else 0

    @property
    def packer(self) -> AdapterPacker:
        """The packer of adapters in host memory. A packed adapter loads in one copy."""
        return self.loop.adapters.packer

    @property
    def experts(self) -> ExpertMonitor:
        """The monitor of how routed adapters use their experts."""
        return self.loop.experts

    def stats(self) -> EngineStats:
        return replace(self.loop.stats.latest, step_age_s=time.monotonic() - self.loop.heartbeat)

    def n_queued(self, tenant: str) -> int:
        return self._inbox.n_queued(tenant)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.loop.settings.eos_token_ids

    @property
    def max_model_len(self) -> int:
        return self.loop.settings.max_model_len

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
        error = EngineDraining("the server went down")
        self._inbox.post(partial(self.loop.outputs.fail_all, error))
        while self._inbox.n_requests and self.alive:
            await asyncio.sleep(_DRAIN_POLL_S)
        return False

    def close(self) -> None:
        """Stops the thread; requests that still run get a final error event."""
        self._inbox.post(self.loop.stop)
        self._thread.join()
        self.loop.adapters.close()
        if self._on_closed is not None:
            self._on_closed()

    def _new_request(self, source: GenerationRequest, listener: Listener) -> Request:
        """Return the request with virtual tokens and a seed.

        Raises ContextOverflow if the request can never run.
        """
        prefix = None if source.adapter is None else source.adapter.plan.prefix
        n_virtual = 0 if prefix is None else prefix.n_virtual
        virtual = [-1 - index for index in range(n_virtual)]
        token_ids = virtual + list(source.prompt_ids)
        if not source.prompt_ids:
            raise ContextOverflow("the prompt is empty; send at least one token")
        n_generated = 1 if source.pooling is None else 0  # at least
        if len(token_ids) + n_generated > self.max_model_len:
            also = " with at least one to generate" if n_generated else ""
            raise ContextOverflow(
                f"the prompt has {len(token_ids)} tokens, the context holds {self.max_model_len}"
                f"{also}; shorten the prompt or raise --max-model-len"
            )
        invocation = None if source.adapter is None else source.adapter.plan.invocation
        seed = source.sampling.seed
        return Request(
            source=source,
            listener=listener,
            loop=asyncio.get_running_loop(),
            token_ids=token_ids,
            n_prompt=len(token_ids),
            n_virtual=n_virtual,
            adapter_from=0 if invocation is None else invoked_at(source.prompt_ids, invocation),
            seed=secrets.randbits(63) if seed is None else seed,
            prompt_key_ids=virtual + prefix_key_ids(source.prompt_ids, source.images)
            if source.images
            else None,
            rope=rope_positions(len(token_ids), source.images, n_virtual)
            if any(image.grid is not None for image in source.images)
            else None,
            blocks=tuple(
                block._replace(first=block.first + n_virtual, end=block.end + n_virtual)
                for block in blocks_of(source.images)
            ),
        )
