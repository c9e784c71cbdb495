"""Answers the lines of batches through the application, and goes on after a restart.

One task for each tenant that has batches, the oldest batch first. A line is a call of the key that
made the batch: its limits, adapters and scopes hold. In the engine it competes as a tenant of its
own with a tiny weight (`Auth`), so that chats go first. An answer is on the disk before the next
line of its worker starts; what ran when the server died runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import orjson
from starlette.types import ASGIApp

from loraplex_server.faults import Faults

from .app_call import Answer, call_app
from .batch_store import BatchStore, answer_record
from .input_file import InputLine, read_lines
from .records import BatchRecord, BatchStatus

__all__ = ["BatchRunner"]

T = TypeVar("T")
_AT_ONCE = 8  # lines of a tenant
_N_TRIES = 5  # of a line that the server cannot answer
_NOT_ITS_FAULT = frozenset({"server_draining", "engine_dead", "queue_full"})
_PAUSE_S = 5.0  # after a failure of the disk
_log = logging.getLogger(__name__)


class BatchRunner:
    """Lives on the event loop; ``thread`` (one) does what the store blocks for."""

    def __init__(self, app: ASGIApp, store: BatchStore, thread: Executor, faults: Faults) -> None:
        self.store = store
        self._app = app
        self._thread = thread
        self._faults = faults
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by tenant
        self._woken: set[str] = set()  # tenants
        self._stops: dict[str, asyncio.Event] = {}  # of batches that run
        self._ends: dict[str, asyncio.Event] = {}  # of batches that somebody waits for

    async def do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def resume(self) -> None:
        """At the start of the server."""
        for tenant in await self.do(self.store.recover):
            self.wake(tenant)

    def wake(self, tenant: str) -> None:
        """There is a new batch."""
        self._woken.add(tenant)
        if tenant not in self._tasks:
            self._tasks[tenant] = asyncio.get_running_loop().create_task(self._work(tenant))

    async def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises ApiError (404, 409)."""
        batch = await self.do(lambda: self.store.cancel(tenant, batch_id))
        if batch_id in self._stops:
            self._stops[batch_id].set()
            return batch
        batch = await self.do(lambda: self.store.finish(tenant, batch_id))  # it has not begun
        self._tell_end(batch_id)
        return batch

    async def wait(self, tenant: str, batch_id: str, timeout_s: float) -> BatchRecord:
        """Until it has ended, at most ``timeout_s``. Raises ApiError (404)."""
        batch = await self.do(lambda: self.store.batch(tenant, batch_id))
        if batch.status.has_ended or not timeout_s:
            return batch
        end = self._ends.setdefault(batch_id, asyncio.Event())
        batch = await self.do(lambda: self.store.batch(tenant, batch_id))
        if batch.status.has_ended:
            self._tell_end(batch_id)
            return batch
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(end.wait(), timeout_s)
        return await self.do(lambda: self.store.batch(tenant, batch_id))

    async def close(self) -> None:
        """Lines that run are given up, to be answered after the next start."""
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
                return await self.do(lambda: self.store.oldest_active(tenant))
            except Exception as error:
                await self._pause(error)

    async def _run(self, batch: BatchRecord) -> None:
        stop = self._stops[batch.id] = asyncio.Event()
        expiry = asyncio.get_running_loop().call_later(batch.expires - time.time(), stop.set)
        try:
            begun = await self.do(lambda: self.store.begin(batch.caller.tenant, batch.id))
            if begun.status is BatchStatus.CANCELLING or begun.status.has_ended:
                stop.set()
            await self._answer_lines(batch, stop)
            await self.do(lambda: self.store.finish(batch.caller.tenant, batch.id))
            self._tell_end(batch.id)
        except* FileNotFoundError:
            _log.exception("%s failed", batch.id)
            await self.do(lambda: self.store.fail(batch.id, "a file of this batch has vanished"))
            self._tell_end(batch.id)
        except* Exception as errors:
            await self._pause(errors.exceptions[0])
        finally:
            expiry.cancel()
            del self._stops[batch.id]

    async def _pause(self, error: Exception) -> None:
        """The disk fails, say: nothing that was answered is lost."""
        _log.exception("batches pause for %g s", _PAUSE_S)
        self._faults.unforeseen(error)
        await asyncio.sleep(_PAUSE_S)

    def _tell_end(self, batch_id: str) -> None:
        if (end := self._ends.pop(batch_id, None)) is not None:
            end.set()

    async def _answer_lines(self, batch: BatchRecord, stop: asyncio.Event) -> None:
        answered = await self.do(lambda: self.store.answered(batch.id))
        path = self.store.path(batch.input_file_id)
        with await self.do(lambda: path.open("rb")) as file:
            lines = (line for line in read_lines(file) if line.number not in answered)
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(_AT_ONCE, batch.n_lines)):
                    workers.create_task(self._worker(batch, lines, stop))

    async def _worker(
        self, batch: BatchRecord, lines: Iterator[InputLine], stop: asyncio.Event
    ) -> None:
        while not stop.is_set():
            line = await self.do(lambda: next(lines, None))
            answer = None if line is None else await self._answer(batch, line, stop)
            if line is None or answer is None:
                return
            response = {
                "status_code": answer.status,
                "request_id": answer.headers.get("x-request-id", ""),
                "body": orjson.Fragment(answer.body),
            }
            record = answer_record(line, response, None)
            failed = answer.status >= 400
            add = partial(self.store.add_answer, batch.id, line.number, record, is_failure=failed)
            await self.do(add)

    async def _answer(
        self, batch: BatchRecord, line: InputLine, stop: asyncio.Event
    ) -> Answer | None:
        """None: stopped before. What the server cannot answer now is asked again."""
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
            if answer.status not in (429, 503):
                return answer
            if answer.status == 503 and _code(answer) not in _NOT_ITS_FAULT:
                n_tries += 1
                if n_tries == _N_TRIES:
                    return answer
            retry_s = float(answer.headers.get("retry-after-ms", "1000")) / 1000
            try:
                await asyncio.wait_for(stop.wait(), retry_s)
            except TimeoutError:
                continue
            return None


def _code(answer: Answer) -> str:
    return str(orjson.loads(answer.body)["error"]["code"])
