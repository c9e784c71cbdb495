"""What happens to requests while processes of a cluster come and go, and names change."""

import asyncio
import json
import os
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import GREEDY, LIMITED, MODEST, cluster_config
from tests.cluster.streams import (
    Streamed,
    chat,
    connect,
    engines_of,
    keep_asking,
    stream,
    taken_by,
    wrong,
)
from tests.support.servers.cluster_process import ClusterProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.anyio]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


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


async def test_adapters_stay_where_they_are_under_load(cluster: ClusterProcess) -> None:
    """However the load falls, a replica loads an adapter once at most."""
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
    lines = ("Engine: HEALTHY, 2 RUNNING", "Gateway: HEALTHY, 2 RUNNING", "Coordinator: HEALTHY")
    for line in lines:
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
    """Each of 400 is answered whole, or refused at once with a time to come again."""
    async with connect(cluster) as client:
        answers = await asyncio.gather(
            *(stream(client, chat(f"a{n % 8}", 200)) for n in range(400))
        )
        served = [a for a in answers if a.status == 200]
        refused = [a for a in answers if a.status == 429]
        assert len(served) + len(refused) == 400
        assert served
        assert refused
        assert not wrong(served, 200)
        assert all(a.retry_after for a in refused)
        while any(e["running"] or e["waiting"] for e in await engines_of(client)):
            await asyncio.sleep(0.2)  # nothing stays behind in an engine


async def test_after_an_overload_every_replica_is_used_again(cluster: ClusterProcess) -> None:
    """No gateway goes on believing in what another gateway's requests made of a replica."""
    names = [f"a{n}" for n in range(8)]
    async with connect(cluster) as client:
        await asyncio.gather(*(stream(client, chat(names[n % 8], 100)) for n in range(300)))
        taken = await taken_by_replica(client, names)
        waited_for, deadline = set(taken), time.monotonic() + 60
        while waited_for and time.monotonic() < deadline:
            for name in names:  # one after another: each goes to its home
                assert not wrong([await stream(client, chat(name, 4))], 4)
            now = await taken_by_replica(client, names)
            waited_for -= {replica for replica in now if now[replica] >= taken[replica] + 2}
    assert len(taken) == 2
    assert not waited_for


async def taken_by_replica(client: httpx.AsyncClient, names: list[str]) -> Counter[str]:
    """Requests for these adapters that each replica has taken."""
    found: Counter[str] = Counter({engine["replica"]: 0 for engine in await engines_of(client)})
    for of_replicas in (await taken_by(client, names)).values():
        found.update(of_replicas)
    return found


async def test_a_greedy_key_does_not_keep_others_waiting(cluster: ClusterProcess) -> None:
    """Through two gateways and two engines, with eight rows and 64 waiting for each key.

    The greedy one sends more than they take: some of its requests are refused, no other's.
    """
    ended: list[str] = []  # whose, in the order of their ends
    n_refused = 0
    full = asyncio.Event()  # the greedy key has all that it may have

    async def ask(client: httpx.AsyncClient, who: str, n_tokens: int) -> Streamed:
        nonlocal n_refused
        answer = await stream(client, chat("a1", n_tokens))
        if answer.status == 429:
            n_refused += 1
            full.set()
        else:
            ended.append(who)
        return answer

    async with (
        connect(cluster, GREEDY) as greedy,
        connect(cluster, MODEST) as modest,
    ):
        crowd = [asyncio.create_task(ask(greedy, "greedy", 250)) for _ in range(240)]
        await full.wait()
        n_before = len(ended)
        few = await asyncio.gather(*(ask(modest, "modest", 8) for _ in range(4)))
        n_meanwhile = len(ended) - n_before - len(few)
        many = await asyncio.gather(*crowd)
    served = [answer for answer in many if answer.status != 429]
    n_after = len(served) - n_before - n_meanwhile
    assert not wrong(few, 8)
    assert not wrong(served, 250)
    print(f"{n_meanwhile} of the greedy key's ended meanwhile, {n_after} afterwards")
    assert n_after > n_meanwhile


async def test_a_killed_gateway_takes_only_its_own_streams(cluster: ClusterProcess) -> None:
    async with connect(cluster) as client:
        stop = asyncio.Event()
        asking = asyncio.gather(
            *(keep_asking(client, 1, 100, stop) for _ in range(6)), return_exceptions=True
        )
        while not all(engine["running"] for engine in await engines_of(client)):
            await asyncio.sleep(0.1)
        victim = min(cluster.replicas("Gateway"))
        os.kill(victim, signal.SIGKILL)
        while victim in cluster.replicas("Gateway"):
            await asyncio.sleep(0.1)
        probes = [await stream(client, chat("a1", 4)) for _ in range(4)]
        stop.set()
        found = await asking
    assert not wrong(probes, 4)
    broken = [one for one in found if isinstance(one, BaseException)]
    assert all(isinstance(one, httpx.HTTPError) for one in broken), broken
    assert len(broken) < 6  # the other gateway's go on
    for one in found:
        if not isinstance(one, BaseException):
            assert not wrong(one, 100)


async def test_an_upgrade_whose_engines_do_not_start_leaves_all_routes_served(
    cluster: ClusterProcess, world: Path
) -> None:
    """The coordinator before it has ended by then: its folder has one owner."""
    before = cluster.replicas("Coordinator")
    config = cluster_config(world, **{"max-model-len": 1 << 20})  # more than the base's positions
    config["server"]["port"] = int(cluster.url.rpartition(":")[2])
    n_before = len(cluster.lines)
    await asyncio.to_thread(cluster.upgrade, config)
    assert "not upgraded" in "".join(cluster.lines[n_before:]), cluster.log
    async with connect(cluster) as client:
        listed = await client.get("/v1/files", timeout=120)
        assert listed.status_code == 200, listed.text
        assert not wrong([await stream(client, chat("a1", 4))], 4)
    assert not before.keys() & cluster.replicas("Coordinator").keys()
    del config["server"]["max-model-len"]
    n_before = len(cluster.lines)
    await asyncio.to_thread(cluster.upgrade, config)
    assert "not upgraded" not in "".join(cluster.lines[n_before:]), cluster.log


async def test_an_upgrade_under_load_cuts_nothing(cluster: ClusterProcess, world: Path) -> None:
    before = cluster.replicas("Engine")
    config = cluster_config(world, **{"max-queue": 500})
    config["server"]["port"] = int(cluster.url.rpartition(":")[2])
    other_base = {**config, "server": {**config["server"], "model": "another"}}
    await asyncio.to_thread(cluster.upgrade, other_base)
    assert "not upgraded: server.model" in cluster.log
    async with connect(cluster) as client:
        stop = asyncio.Event()
        asking = asyncio.create_task(keep_asking(client, 4, 24, stop))
        await asyncio.to_thread(cluster.upgrade, config)
        stop.set()
        answers = await asking
    assert not wrong(answers, 24)
    assert answers
    assert not before.keys() & cluster.replicas("Engine").keys(), cluster.log
