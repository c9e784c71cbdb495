"""Nothing that is quick waits for what is slow: drains, downloads, loads, generation."""

import asyncio
import threading
from collections.abc import Iterator

import anyio.to_thread
import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.adapters.worker_pools import WorkerPools
from tests.server.conftest import Front
from tests.support.adapters.lora_files import write_lora

pytestmark = pytest.mark.anyio

_SOON_S = 20  # for what takes milliseconds, on a machine that has other work


async def _quick(front: Front) -> list[httpx.Response]:
    """What reads, and what uses an adapter that is in memory."""
    calls = [
        *[front.client.get(path) for path in ("/v1/models", "/v1/adapters", "/metrics", "/ready")],
        front.client.get("/v1/adapters/ready"),
        front.client.get("/v1/models/ready"),
        front.chat(adapter="nobody"),  # the answer lists what exists
    ]
    return await asyncio.wait_for(asyncio.gather(*calls), _SOON_S)


async def test_twenty_deletes_of_busy_adapters_hold_up_nothing(
    front: Front, base_spec: BaseSpec
) -> None:
    front.engine.max_queue, front.engine.manual = 64, True
    names = [f"busy-{number}" for number in range(20)]
    for number, name in enumerate(["ready", *names]):
        front.store.put_directory(name, write_lora(front.root / name, base_spec, seed=number))
    asking = [asyncio.create_task(front.chat(adapter=name, max_tokens=1)) for name in names]
    await front.engine.arrival(len(names))
    deleting = [asyncio.create_task(front.client.delete(f"/v1/adapters/{name}")) for name in names]
    while any(name in names for name in [card.name for card in front.store.list()]):
        await asyncio.sleep(0)  # until the names are gone
    assert not any(task.done() for task in deleting)
    answers = await _quick(front)
    assert [answer.status_code for answer in answers] == [200] * 6 + [404]
    write_lora(front.root / "new", base_spec, seed=50)
    put = await asyncio.wait_for(
        front.client.put("/v1/adapters/new", json={"source": "new"}), _SOON_S
    )
    assert put.status_code == 201
    front.engine.step()
    for answer in await asyncio.gather(*asking, *deleting):
        assert answer.status_code == 200
    assert all(task.result().json()["drained"] for task in deleting)


@pytest.fixture
def stuck(front: Front) -> Iterator[WorkerPools]:
    """Every thread for loads, changes, downloads and generation waits."""
    pools = front.app.state.parts.pools
    may_end = threading.Event()
    for pool in (pools.loads, pools.changes, pools.jobs, pools.generation):
        for _ in range(16):
            pool._pool.submit(may_end.wait)
    yield pools
    may_end.set()


async def test_reads_and_resident_adapters_do_not_wait_behind_stuck_work(
    front: Front, base_spec: BaseSpec, stuck: WorkerPools
) -> None:
    front.store.put_directory("ready", write_lora(front.root / "ready", base_spec))
    answers = await _quick(front)
    assert [answer.status_code for answer in answers] == [200] * 6 + [404]
    chat = await asyncio.wait_for(front.chat(adapter="ready"), _SOON_S)
    assert chat.json()["adapter"]["name"] == "ready"


async def test_chats_and_reads_need_no_thread_of_starlette_s(
    front: Front, base_spec: BaseSpec, stuck: WorkerPools
) -> None:
    """Its threads run synchronous routes, dependencies and files: uploads may hold them all."""
    front.store.put_directory("ready", write_lora(front.root / "ready", base_spec))
    threads = anyio.to_thread.current_default_thread_limiter()
    holders = [object() for _ in range(int(threads.total_tokens))]
    for holder in holders:
        await threads.acquire_on_behalf_of(holder)
    try:
        answers = await _quick(front)
        assert [answer.status_code for answer in answers] == [200] * 6 + [404]
        for path in ("/health", "/version", "/openapi.json"):
            answer = await asyncio.wait_for(front.client.get(path), _SOON_S)
            assert answer.status_code == 200
        chat = await asyncio.wait_for(front.chat(adapter="ready"), _SOON_S)
        assert chat.json()["adapter"]["name"] == "ready"
        assert len(await asyncio.wait_for(front.chat_events(), _SOON_S)) > 1
    finally:
        for holder in holders:
            threads.release_on_behalf_of(holder)
