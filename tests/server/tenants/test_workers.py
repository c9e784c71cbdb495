"""Slow grammars, templates and files of one tenant leave a worker process to the others."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
import pytest

from loraplex_server.worker_processes.pool import WorkerProcesses
from tests.server.tenants.conftest import House

pytestmark = pytest.mark.anyio

ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
SLOW = (1000003, 1000033, 1000037)  # multiples of them take seconds to compile


@contextlib.asynccontextmanager
async def _all_taken(
    workers: WorkerProcesses, calls: list[Coroutine[Any, Any, httpx.Response]]
) -> AsyncIterator[None]:
    """While acme's calls run, the first of them for ever. They leave at the end."""
    workers.start()
    worker = workers._idle[-1]  # the next to be used
    await worker.ready()
    os.kill(worker._process.pid, signal.SIGSTOP)
    asked = [asyncio.create_task(call) for call in calls]
    while worker in workers._idle:
        await asyncio.sleep(0)
    try:
        yield
    finally:
        for call in asked:
            call.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_grammars(house: House) -> None:
    grammars = house.front.app.state.parts.grammars
    grammars.start()
    workers = (await asyncio.wrap_future(grammars._compiler)).workers
    workers._max_wait_s = 1.0
    grammars._cpu_s = 60.0
    schemas = [{"type": "number", "multipleOf": n} for n in SLOW]
    slow = [{"prompt": "hi", "guided_json": schema} for schema in schemas]
    calls = [house.ask("acme", "POST", "/v1/completions", body) for body in slow]
    async with _all_taken(workers, calls):
        asked = {"prompt": "hi", "guided_choice": ["yes", "no"]}
        answer = await house.ask("umbra", "POST", "/v1/completions", asked)
        assert answer.status_code == 200, answer.text
    await grammars.close()


async def test_templates(house: House) -> None:
    for number in range(3):
        await house.upload("acme", f"slow-{number}", number, template=f"{ENDLESS}{number}")
    await house.upload("umbra", "quick", template="{{ messages[0].content }}")
    workers = house.front.app.state.parts.text._templates._workers
    workers._max_wait_s = 0.5
    messages = [{"role": "user", "content": "hi"}]
    slow = [{"adapter": f"slow-{number}", "messages": messages} for number in range(3)]
    calls = [house.ask("acme", "POST", "/v1/chat/completions", body) for body in slow]
    async with _all_taken(workers, calls):
        asked = {"adapter": "quick", "messages": messages}
        answer = await house.ask("umbra", "POST", "/v1/chat/completions", asked)
        assert answer.status_code == 200, answer.text
    await workers.close()


async def test_files(house: House) -> None:
    workers = house.front.app.state.parts.file_checks._workers
    async with _all_taken(workers, [house.upload_file("acme") for _ in range(3)]):
        assert (await house.upload_file("umbra")).status_code == 200
    assert (await house.upload_file("acme")).status_code == 200
