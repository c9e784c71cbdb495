"""POST /v1/adapters/{name}/unload, with an engine that loads adapters and computes with them."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.adapters.adapter_memory import AdapterMemory
from loraplex_server.engine.engine import Engine
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.asgi_call import events_of
from tests.support.servers.engines import running_engine

pytestmark = pytest.mark.anyio

BODY = {
    "prompt": "hello there",
    "max_tokens": 12,
    "temperature": 0,
    "logprobs": 2,
    "ignore_eos": True,
}


class Served:
    """The adapter ``poet`` on a server with an engine of its own."""

    def __init__(self, front: Front, engine: Engine) -> None:
        self.front, self.engine = front, engine

    async def ask(self, adapter: object = "poet") -> object:
        answer = await self.front.complete(**BODY, adapter=adapter)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    async def act(self, action: str, name: str = "poet") -> httpx.Response:
        return await self.front.client.post(f"/v1/adapters/{name}/{action}")

    async def card(self, name: str = "poet") -> dict[str, Any]:
        card: dict[str, Any] = (await self.front.client.get(f"/v1/adapters/{name}")).json()
        return card

    async def metric(self, name: str, **labels: str) -> float:
        page = (await self.front.client.get("/metrics")).text
        samples = [s for f in text_string_to_metric_families(page) for s in f.samples]
        (found,) = (s for s in samples if s.name == name and labels.items() <= s.labels.items())
        return float(found.value)


@pytest.fixture
def served(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Served]:
    with running_engine(tiny_model()) as engine:
        front = make_front(
            tokenizer, base_spec, tmp_path, engine=engine, packer=engine.packer, tier=engine
        )
        folder = write_lora(front.root / "poet", base_spec, seed=1, scale=0.5)
        front.store.put_directory("poet", folder)
        yield Served(front, engine)
        front.close()


@contextmanager
def held_steps(engine: Engine) -> Iterator[threading.Event]:
    """The engine computes two steps, then none until the event is set."""
    run, left, go_on = engine.loop.runner.run, [None, None], threading.Event()

    def held(chunks: Any) -> Any:
        if not left:
            go_on.wait()
        else:
            left.pop()
        return run(chunks)

    engine.loop.runner.run = held  # type: ignore[method-assign]
    try:
        yield go_on
    finally:
        go_on.set()
        engine.loop.runner.run = run  # type: ignore[method-assign]


async def test_an_unloaded_adapter_takes_no_memory_and_answers_as_before_when_asked_again(
    served: Served,
) -> None:
    before = await served.ask()
    used = served.engine.stats().pool_bytes_used
    card = await served.card()
    assert (card["tier"], card["n_bytes"]["device"]) == ("device", used)
    assert card["n_bytes"]["host"] > 0
    labels = {"adapter": "poet", "tier": "device"}
    assert await served.metric("loraplex_adapter_bytes", **labels) == used > 0

    answer = await served.act("unload")
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == f'"{card["digest"]}"'
    unloaded = answer.json()
    assert unloaded["tier"] == "disk"
    assert unloaded["n_bytes"] == {"disk": card["n_bytes"]["disk"], "host": 0, "device": 0}
    assert unloaded["last_load_ms"]["device"] is None
    assert served.engine.stats().pool_bytes_used == 0
    assert served.front.store.stats().host_bytes_used == 0
    assert await served.metric("loraplex_adapter_bytes", **labels) == 0
    (listed,) = (await served.front.client.get("/v1/adapters")).json()["data"]
    assert listed["n_bytes"] == unloaded["n_bytes"]

    assert await served.ask() == before  # tokens, texts and log-probabilities
    assert (await served.card())["n_bytes"] == card["n_bytes"]


async def test_what_is_on_disk_already_is_unloaded_again_and_nobody_is_a_404(
    served: Served,
) -> None:
    for _ in range(2):
        answer = await served.act("unload")
        assert (answer.status_code, answer.json()["tier"]) == (200, "disk")
    missing = await served.act("unload", "nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "adapter_not_found"


async def test_an_adapter_in_use_stays_and_its_stream_comes_to_its_end(served: Served) -> None:
    whole = await served.front.completion_events(**BODY, adapter="poet")
    body = {"model": "base", **BODY, "adapter": "poet", "stream": True}
    with held_steps(served.engine) as go_on:
        async with served.front.call("/v1/completions", body) as call:
            first = await call.next_body()
            refused = await served.act("unload")
            assert refused.status_code == 409
            error = refused.json()["error"]
            assert (error["code"], error["type"]) == ("adapter_in_use", "conflict_error")
            assert "1 request uses adapter 'poet'" in error["message"]
            assert (await served.card())["tier"] == "device"
            go_on.set()
            events = events_of(first + await call.rest())
    assert texts(events) == texts(whole)
    assert (await served.act("unload")).json()["tier"] == "disk"


def texts(events: list[Any]) -> list[str]:
    """Of a stream that has ended; its chunks are cut differently each time."""
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return ["".join(choice["text"] for choice in choices)]


async def test_a_pinned_adapter_is_refused_under_each_name_of_its_content(
    served: Served,
) -> None:
    served.front.store.put_directory("singer", served.front.root / "poet")
    await served.ask()
    await served.act("pin")
    for name in ("poet", "singer"):
        refused = await served.act("unload", name)
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert error["code"] == "adapter_pinned"
        assert "unpin 'poet'" in error["message"]
        assert (await served.card(name))["tier"] == "device"
    await served.act("unpin")
    assert (await served.act("unload", "singer")).json()["tier"] == "disk"
    assert (await served.card("poet"))["tier"] == "disk"  # memory is by content


async def test_an_unload_waits_for_a_load_that_is_under_way(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = threading.Event()
    monkeypatch.setattr(AdapterMemory, "copy", lambda *_: copied.wait())
    try:
        assert (await served.act("warm")).status_code == 200
        unloading = asyncio.create_task(served.act("unload"))
        while served.front.store.get("poet").n_bytes.host:
            await asyncio.sleep(0)  # until the request has come so far
        await served.engine.unload("nothing")  # the engine has read what came before
        assert not unloading.done()
    finally:
        copied.set()
    assert (await unloading).json()["tier"] == "disk"
    assert served.engine.stats().pool_bytes_used == 0


async def test_a_mixture_that_runs_is_not_its_parts(served: Served, base_spec: BaseSpec) -> None:
    write_lora(served.front.root / "sql", base_spec, seed=2, scale=0.5)
    served.front.store.put_directory("sql", served.front.root / "sql")
    mixture = [{"name": "poet", "weight": 0.5}, {"name": "sql", "weight": 0.5}]
    before = await served.ask(mixture)
    for name in ("poet", "sql"):
        assert (await served.act("unload", name)).json()["tier"] == "disk"
    assert served.engine.stats().pool_bytes_used > 0  # the mixture's own
    assert await served.ask(mixture) == before


async def test_unloads_among_requests_change_no_answer(served: Served) -> None:
    before = await served.ask()
    done = asyncio.Event()

    async def unload() -> list[int]:
        statuses = []
        while not done.is_set():
            statuses.append((await served.act("unload")).status_code)
        return statuses

    unloading = asyncio.create_task(unload())
    for _ in range(8):
        assert await asyncio.gather(*(served.ask() for _ in range(4))) == [before] * 4
        while (await served.card())["tier"] != "disk":
            await asyncio.sleep(0)
    done.set()
    assert {*await unloading} <= {200, 409}
