"""What happens to requests while processes of a cluster come and go, and names change."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import ADMIN, LIMITED, cluster_config
from tests.support.cluster_process import ClusterProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.anyio]

CHAT = "/v1/chat/completions"
ENDED = "data: [DONE]"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


class Streamed(NamedTuple):
    status: int
    n_tokens: int
    error: str | None  # code of the error event
    done: bool
    at: float  # when it ended, by the monotonic clock


def chat(adapter: str | None, n_tokens: int = 16, **fields: Any) -> dict[str, Any]:
    return {
        "adapter": adapter,
        "messages": [{"role": "user", "content": "the server keeps"}],
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
    n_tokens, error, done = 0, None, False
    async with client.stream("POST", CHAT, json=body) as answer:
        if answer.status_code != 200:
            code = json.loads(await answer.aread())["error"]["code"]
            return Streamed(answer.status_code, 0, code, False, time.monotonic())
        async for line in lines_of(answer):
            if line == ENDED:
                done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = event["error"]["code"]
                elif event.get("usage"):
                    n_tokens = event["usage"]["completion_tokens"]
    return Streamed(200, n_tokens, error, done, time.monotonic())


async def lines_of(answer: httpx.Response) -> AsyncIterator[str]:
    """Cut at newlines alone: httpx cuts at every sign that Unicode calls a line's end."""
    rest = b""
    async for piece in answer.aiter_raw():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()


def connect(cluster: ClusterProcess, headers: dict[str, str] = ADMIN) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=200)
    return httpx.AsyncClient(base_url=cluster.url, headers=headers, timeout=900, limits=limits)


async def keep_asking(
    client: httpx.AsyncClient, n_users: int, n_tokens: int, stop: asyncio.Event
) -> list[Streamed]:
    """Users that each send one stream after another, to adapter after adapter."""

    async def user(number: int) -> list[Streamed]:
        found = []
        while not stop.is_set():
            found.append(await stream(client, chat(f"a{(number + len(found)) % 8}", n_tokens)))
        return found

    return [each for one in await asyncio.gather(*map(user, range(n_users))) for each in one]


def homes_of(page: str) -> dict[str, set[str]]:
    """Adapter → the replicas that have it on their device."""
    homes: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(page):
        if family.name == "vllm:lora_requests_info":
            for sample in family.samples:
                for name in filter(None, sample.labels["running_lora_adapters"].split(",")):
                    homes[name].add(sample.labels["replica"])
    return homes


def loads_of(page: str) -> int:
    """To devices, of all replicas."""
    for family in text_string_to_metric_families(page):
        if family.name == "loraplex_adapter_loads":
            return int(sum(sample.value for sample in family.samples))
    return 0


async def page_of(client: httpx.AsyncClient) -> str:
    return (await client.get("/metrics")).raise_for_status().text


def wrong(answers: Sequence[Streamed], n_tokens: int) -> list[Streamed]:
    return [
        a for a in answers if (a.status, a.n_tokens, a.error, a.done) != (200, n_tokens, None, True)
    ]


async def test_adapters_stay_where_they_are_under_load(cluster: ClusterProcess) -> None:
    """Of adapters that nobody has asked for before, each replica loads one at most once."""
    names, n_rounds = [f"a{n}" for n in range(16, 24)], 6
    async with connect(cluster) as client:
        before = loads_of(await page_of(client))
        for _ in range(n_rounds):
            answers = await asyncio.gather(*(stream(client, chat(name, 8)) for name in names))
            assert not wrong(answers, 8)
        homes: dict[str, set[str]] = {}
        while not homes.keys() >= set(names):  # the page is a second old
            await asyncio.sleep(0.5)
            homes = homes_of(await page_of(client))
        n_loads = loads_of(await page_of(client)) - before
    assert n_loads <= 2 * len(names)  # 48 requests, and nothing is loaded twice by a replica
    assert len(set.union(*(homes[name] for name in names))) == 2  # both take a part
    n_twice = sum(len(homes[name]) > 1 for name in names)
    print(f"{n_twice} of {len(names)} adapters have two homes")


async def test_another_terminal_sees_what_runs(cluster: ClusterProcess) -> None:
    told = await asyncio.to_thread(cluster.say, "status")
    assert cluster.url in told
    for line in ("Engine: HEALTHY, 2 RUNNING", "Gateway: HEALTHY, 2 RUNNING", "Desk: HEALTHY"):
        assert line in told


async def test_metrics_tell_of_every_process_with_its_label(cluster: ClusterProcess) -> None:
    async with connect(cluster) as client:
        await stream(client, chat("a1"))
        families = {
            f.name: f.samples for f in text_string_to_metric_families(await page_of(client))
        }
    engines = {s.labels["replica"] for s in families["vllm:num_requests_running"]}
    fronts = {s.labels["replica"] for s in families["http_requests"]}
    assert len(engines) == 2
    assert not engines & fronts
    counted = [s for s in families["loraplex_adapter_requests"] if s.labels["adapter"] == "a1"]
    assert sum(s.value for s in counted) >= 1
    assert {s.labels["replica"] for s in counted} <= fronts


async def test_of_two_replacements_at_once_one_wins(cluster: ClusterProcess, world: Path) -> None:
    async with connect(cluster) as client:
        files = [
            {
                "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
                "weights": (
                    "adapter_model.safetensors",
                    (folder / "adapter_model.safetensors").read_bytes(),
                ),
            }
            for folder in (world / "adapters" / f"a{number}" for number in range(1, 8))
        ]
        first = await client.put("/v1/adapters/mine", files=files[0])
        assert first.status_code == 201, first.text
        seen = {"If-Match": first.headers["etag"]}
        changes = [client.put("/v1/adapters/mine", files=f, headers=seen) for f in files[1:]]
        statuses = Counter(answer.status_code for answer in await asyncio.gather(*changes))
        assert statuses == {200: 1, 412: 5}
        gone = await client.delete("/v1/adapters/mine")
        assert gone.status_code == 200, gone.text
        await asyncio.sleep(1.5)  # a gateway may answer a name from memory for a second
        again = [(await client.post(CHAT, json=chat("mine"))).status_code for _ in range(4)]
        assert again == [404] * 4  # at whichever gateway


async def test_a_keys_limit_holds_across_gateways(cluster: ClusterProcess) -> None:
    async with connect(cluster, LIMITED) as client:
        answers = await asyncio.gather(*(stream(client, chat(None, 1)) for _ in range(30)))
    assert Counter(a.status for a in answers)[200] in (10, 11, 12)  # it refills while they come
    assert {a.error for a in answers if a.status == 429} == {"rate_limit_exceeded"}


async def test_a_batch_is_found_whichever_gateway_is_asked(cluster: ClusterProcess) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions",
            "body": {"model": "a1", "prompt": "the server", "max_tokens": 3}}  # fmt: skip
    async with connect(cluster) as client:
        sent = await client.post(
            "/v1/files", files={"file": json.dumps(line).encode()}, data={"purpose": "batch"}
        )
        assert sent.status_code == 200, sent.text
        body = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions",
                "completion_window": "24h"}  # fmt: skip
        batch = (await client.post("/v1/batches", json=body)).raise_for_status().json()
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.2)
            found = await client.get(f"/v1/batches/{batch['id']}")
            batch = found.raise_for_status().json()
        assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


async def test_an_overload_loses_nothing(cluster: ClusterProcess) -> None:
    async with connect(cluster) as client:
        answers = await asyncio.gather(*(stream(client, chat(f"a{n % 8}", 4)) for n in range(150)))
    assert not [a for a in answers if a.status not in (200, 429)]
    assert not wrong([a for a in answers if a.status == 200], 4)


async def test_a_killed_replica_ends_only_streams_that_had_output(
    cluster: ClusterProcess,
) -> None:
    async with connect(cluster) as client:
        stop = asyncio.Event()
        asking = asyncio.create_task(keep_asking(client, 6, 200, stop))
        await asyncio.sleep(3)  # until streams are under way on both
        before = cluster.replicas("Engine")
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        probe = await stream(client, chat("a1", 4))
        served_s = probe.at - killed_at
        while len(cluster.replicas("Engine")) < 2:
            await asyncio.sleep(0.2)
        stop.set()
        answers = await asking
    cut = [a for a in answers if a.error is not None]
    assert not wrong([probe], 4)
    assert not wrong([a for a in answers if a.error is None], 200)
    assert all(a.done and a.status == 200 for a in cut)  # an error event, and the end
    assert 0 < len(cut) <= 6
    print(f"served again after {served_s:.1f} s, {len(cut)} streams cut of {len(answers)}")


async def test_an_upgrade_under_load_cuts_nothing(cluster: ClusterProcess, world: Path) -> None:
    before = cluster.replicas("Engine")
    config = cluster_config(world, **{"max-queue": 500})
    config["server"]["port"] = int(cluster.url.rpartition(":")[2])
    async with connect(cluster) as client:
        stop = asyncio.Event()
        asking = asyncio.create_task(keep_asking(client, 4, 24, stop))
        await asyncio.to_thread(cluster.upgrade, config)
        stop.set()
        answers = await asking
    assert not wrong(answers, 24)
    assert answers
    assert not before.keys() & cluster.replicas("Engine").keys()
