"""Answers the lines of batches through the application, and resumes after a restart.

Each tenant with batches has one task, which runs the oldest batch first. A line is a call of the
key that made the batch, with its limits, adapters and scopes. In the engine, batches are a tenant
of their own with a tiny weight (`Auth`), so that chats go first. An answer is on the disk before
its worker starts the next line. Lines that ran when the server died run again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

import httpx
import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_server.api.request_info import BatchCaller
from loraplex_server.health_tracker import log_extra
from loraplex_server.tenant_shares import TenantThreads

from .batch_store import BatchStore, answer_record
from .input_file import InputLine, read_lines
from .records import BatchRecord, BatchStatus

T = TypeVar("T")
_AT_ONCE = 8  # running lines of a tenant
_N_TRIES = 5  # for a line that the server cannot answer
_NOT_ITS_FAULT = frozenset({"server_draining", "engine_dead", "queue_full"})
_PAUSE_S = 5.0  # after a failure of the disk
_log = logging.getLogger(__name__)


class BatchRunner:
    """Runs batches on the event loop. Calls of the store run on the one thread of ``thread``."""

    def __init__(
        self, app: ASGIApp, store: BatchStore, thread: TenantThreads, readers: TenantThreads
    ) -> None:
        """``readers``: threads that read lines."""
        self.store = store
        self._app = app
        self._thread, self._readers = thread, readers
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by tenant
        self._woken: set[str] = set()  # tenants
        self._stops: dict[str, asyncio.Event] = {}  # of running batches
        self._ends: dict[str, asyncio.Event] = {}  # of batches with waiting requests
        self._finishing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def do(self, tenant: str, work: Callable[[], T]) -> T:
        """Run a call of the store for a client. Raises ApiError: 429, or that of the call."""
        return await self._thread.run(tenant, work)

    async def resume(self) -> None:
        """Continue unfinished batches, at the start of the server."""
        for tenant in await self.do("", self.store.recover):
            self.wake(tenant)

    def wake(self, tenant: str) -> None:
        """Start work on a tenant's new batch."""
        self._woken.add(tenant)
        if tenant not in self._tasks:
            self._tasks[tenant] = asyncio.get_running_loop().create_task(self._work(tenant))

    async def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Cancel a batch. Raises ApiError (404, 409)."""
        batch = await self.do(tenant, lambda: self.store.cancel(tenant, batch_id))
        if batch_id in self._stops:
            self._stops[batch_id].set()
            return batch
        await self._finish(tenant, batch_id)  # has not begun
        return await self.do(tenant, lambda: self.store.batch(tenant, batch_id))

    async def wait(self, tenant: str, batch_id: str, timeout_s: float) -> BatchRecord:
        """Wait for the batch's end, at most ``timeout_s``. Raises ApiError (404)."""
        batch = await self.do(tenant, lambda: self.store.batch(tenant, batch_id))
        if batch.status.has_ended or not timeout_s:
            return batch
        end = self._ends.setdefault(batch_id, asyncio.Event())
        batch = await self.do(tenant, lambda: self.store.batch(tenant, batch_id))
        if batch.status.has_ended:
            self._tell_end(batch_id)
            return batch
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(end.wait(), timeout_s)
        return await self.do(tenant, lambda: self.store.batch(tenant, batch_id))

    async def close(self) -> None:
        """Stop running lines. The next start answers them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, tenant: str) -> None:
        try:
            while tenant in self._woken:
                self._woken.discard(tenant)
                while batch := await self._next_batch(tenant):
                    await self._run(batch)
        finally:
            del self._tasks[tenant]

    async def _next_batch(self, tenant: str) -> BatchRecord | None:
        while True:
            try:
                await self._all_pieces(tenant, self.store.delete_old_answers(tenant))
                return await self._do(tenant, lambda: self.store.oldest_active(tenant))
            except Exception as error:
                await self._pause(error)

    async def _run(self, batch: BatchRecord) -> None:
        tenant = batch.caller.tenant
        stop = self._stops[batch.id] = asyncio.Event()
        expiry = asyncio.get_running_loop().call_later(batch.expires - time.time(), stop.set)
        try:
            begun = await self._do(tenant, lambda: self.store.begin(tenant, batch.id))
            if begun.status is BatchStatus.CANCELLING or begun.status.has_ended:
                stop.set()
            await self._answer_lines(batch, stop)
            await self._finish(tenant, batch.id)
        except* FileNotFoundError:
            _log.exception("%s failed", batch.id)
            problem = "a file of this batch is missing"
            await self._do(tenant, lambda: self.store.fail(batch.id, problem))
            self._tell_end(batch.id)
        except* Exception as errors:
            await self._pause(errors.exceptions[0])
        finally:
            expiry.cancel()
            del self._stops[batch.id]

    async def _do(self, tenant: str, work: Callable[[], T]) -> T:
        """Run a call of the store for a batch, which does not wait for the tenant's clients."""
        return await self._thread.run(f"batch:{tenant}", work)

    async def _finish(self, tenant: str, batch_id: str) -> None:
        """End the batch in pieces, once: a cancel may come while the batch begins."""
        async with self._finishing.setdefault(batch_id, asyncio.Lock()):
            await self._all_pieces(tenant, self.store.finish(tenant, batch_id))
        self._tell_end(batch_id)

    async def _all_pieces(self, tenant: str, pieces: Iterator[bool]) -> None:
        while await self._do(tenant, lambda: next(pieces, False)):
            pass

    async def _pause(self, error: Exception) -> None:
        """Wait after a failure, for instance of the disk. Stored answers are not lost."""
        _log.exception("batches pause for %g s", _PAUSE_S, extra=log_extra(error))
        await asyncio.sleep(_PAUSE_S)

    def _tell_end(self, batch_id: str) -> None:
        if (end := self._ends.pop(batch_id, None)) is not None:
            end.set()

    async def _answer_lines(self, batch: BatchRecord, stop: asyncio.Event) -> None:
        answered = await self._do(batch.caller.tenant, lambda: self.store.answered(batch.id))
        path = self.store.path(batch.input_file_id)
        with path.open("rb") as file:
            lines = read_lines(file, without=answered)
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(_AT_ONCE, batch.n_lines)):
                    workers.create_task(self._worker(batch, lines, stop))

    async def _worker(
        self, batch: BatchRecord, lines: Iterator[InputLine], stop: asyncio.Event
    ) -> None:
        while not stop.is_set():
            line = await self._readers.run(batch.caller.tenant, lambda: next(lines, None))
            answer = None if line is None else await self._answer(batch, line, stop)
            if line is None or answer is None:
                return
            response = {
                "status_code": answer.status_code,
                "request_id": answer.headers.get("x-request-id", ""),
                "body": orjson.Fragment(answer.content),
            }
            record = answer_record(line, response, None)
            failed = answer.status_code >= 400
            add = partial(self.store.add_answer, batch.id, line.number, record, is_failure=failed)
            await self._do(batch.caller.tenant, add)

    async def _answer(
        self, batch: BatchRecord, line: InputLine, stop: asyncio.Event
    ) -> httpx.Response | None:
        """Return None if the batch is stopped. Retry while the server cannot answer."""
        n_tries = 0
        while True:
            calling = asyncio.ensure_future(
                call_app(self._app, batch.caller, line.endpoint, line.body)
            )
            stopping = asyncio.ensure_future(stop.wait())
            try:
                await asyncio.wait([calling, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not calling.done():
                    return None
                answer = calling.result()
            finally:
                calling.cancel()
                stopping.cancel()
                await asyncio.gather(calling, stopping, return_exceptions=True)
            if answer.status_code not in (429, 503):
                return answer
            if answer.status_code == 503 and _code(answer) not in _NOT_ITS_FAULT:
                n_tries += 1
                if n_tries == _N_TRIES:
                    return answer
            retry_s = float(answer.headers.get("retry-after-ms", "1000")) / 1000
            try:
                await asyncio.wait_for(stop.wait(), retry_s)
            except TimeoutError:
                continue
            return None


def _code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


async def call_app(app: ASGIApp, caller: BatchCaller, path: str, body: bytes) -> httpx.Response:
    """POST JSON through every middleware. Cancelling the coroutine ends the call."""

    async def app_for_caller(scope: Scope, receive: Receive, send: Send) -> None:
        caller.attach(scope)
        await app(scope, receive, send)

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app_for_caller),
        base_url="http://127.0.0.1",
        trust_env=False,
    ) as client:
        headers = {"content-type": "application/json"}
        return await client.post(path, content=body, headers=headers)
