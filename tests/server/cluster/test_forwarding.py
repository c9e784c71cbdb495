"""The requests that a gateway forwards to the coordinator."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.types import Message
from transformers import PreTrainedTokenizerFast

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from ray.exceptions import ActorUnavailableError

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_server.adapters.learning.jobs import Progress
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.cluster.gateway.forwarding import (
    ForwardedRequest,
    answer_forwarded,
    with_forwarding,
)
from loraplex_server.services import parts_of
from loraplex_server.settings.api_keys import EVERY_ADAPTER, ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio

ADMIN, INFER, LIMITED = "admin-secret", "infer-secret", "limited-secret"
PIECE, N_PIECES = bytes(1 << 16), 8


class Answering:
    def __init__(self, lists: AsyncGenerator[list[Message]]) -> None:
        self._lists = lists

    def __aiter__(self) -> AsyncIterator[list[Message]]:
        return self._lists

    def cancel(self) -> None:
        raise AssertionError("nobody leaves")


class Coordinator:
    """A handle of the deployment whose application is here."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.asked: list[ForwardedRequest] = []

    def options(self, **given: object) -> Coordinator:
        return self

    def remote(self, request: ForwardedRequest) -> Answering:
        self.asked.append(request)
        return Answering(answer_forwarded(self.front.app, request))


class World(NamedTuple):
    coordinator: Coordinator
    client: httpx.AsyncClient  # of a gateway


@pytest.fixture
def world(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[World]:
    limited = replace(ApiKey.of(LIMITED, Scope.INFER), requests_per_minute=1)
    keys = (ApiKey.of(ADMIN, Scope.ADMIN), ApiKey.of(INFER, Scope.INFER), limited)
    http = HttpConfig(host="0.0.0.0", api_keys=keys, max_body_bytes=2 * N_PIECES * len(PIECE))
    yield from _world(tokenizer, base_spec, tmp_path, http)


@pytest.fixture
def keyless(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[World]:
    yield from _world(tokenizer, base_spec, tmp_path, HttpConfig())


def _world(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path, http: HttpConfig
) -> Iterator[World]:
    meter_of = functools.cache(Meter)  # both count with the same
    front = make_front(tokenizer, base_spec, tmp_path, http, meter_of=meter_of)
    coordinator: Any = Coordinator(front)
    transport = httpx.ASGITransport(with_forwarding(front.app, coordinator, http, meter_of))
    yield World(
        coordinator, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
    )
    front.close()


@pytest.mark.parametrize(
    ("path", "secret", "status"),
    [
        ("/v1/files", "", 401),
        ("/v1/responses", "wrong", 401),
        ("/v1/adapters/generate", INFER, 403),
        ("/v1/adapters/train", "", 401),
    ],
)
async def test_no_body_of_a_caller_who_is_refused_is_read(
    world: World, path: str, secret: str, status: int
) -> None:
    taken, answer = await _post(world, path, secret)
    assert answer.status_code == status
    assert "x-request-id" in answer.headers  # the coordinator's own answer
    assert taken == 0


async def test_no_body_of_a_key_without_requests_left_is_read(world: World) -> None:
    taken, answer = await _post(world, "/v1/files", LIMITED)
    assert (taken, answer.status_code) == (N_PIECES, 415)  # it is no form
    taken, answer = await _post(world, "/v1/files", LIMITED)
    assert (taken, answer.status_code) == (0, 429)
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    "headers", [{"host": "elsewhere.example"}, {"origin": "https://elsewhere.example"}]
)
async def test_no_body_of_another_sites_page_is_read(
    keyless: World, headers: dict[str, str]
) -> None:
    taken, answer = await _post(keyless, "/v1/files", "", headers)
    assert (taken, answer.status_code) == (0, 403)


async def test_the_body_of_a_caller_who_may_goes_to_the_coordinator_whole(world: World) -> None:
    taken, answer = await _post(world, "/v1/adapters/generate", ADMIN)
    assert answer.status_code == 400  # it is no JSON
    assert taken == N_PIECES
    assert world.coordinator.asked[0].body == PIECE * N_PIECES


async def test_what_may_be_as_large_as_an_adapter_is_not_forwarded(world: World) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    answer = await world.client.put("/v1/adapters/generate", content=PIECE, headers=headers)
    assert answer.status_code // 100 == 4
    assert not world.coordinator.asked


async def test_a_response_whose_coordinator_is_lost_ends_with_an_error_event(world: World) -> None:
    _lose(world.coordinator)
    body = {"model": "base", "input": "hi", "stream": True}
    headers = {"authorization": f"Bearer {ADMIN}"}
    answer = await world.client.post("/v1/responses", json=body, headers=headers)
    assert answer.status_code == 200
    *_, last = answer.text.rstrip().split("\n\n")
    name, _, data = last.partition("\ndata: ")
    assert name == "event: error"
    assert json.loads(data)["code"] == "coordinator_lost"


async def test_the_events_of_a_job_break_off_when_the_coordinator_is_lost(world: World) -> None:
    """A whole stream ends with the end of the job."""
    goes_on = threading.Event()

    def work(progress: Progress) -> AdapterCard:
        goes_on.wait(60)
        raise RuntimeError("nobody asks any more")

    job = parts_of(world.coordinator.front.app).jobs.start("a", EVERY_ADAPTER, work)
    _lose(world.coordinator)
    headers = {"authorization": f"Bearer {ADMIN}"}
    try:
        with pytest.raises(ActorUnavailableError):
            await world.client.get(f"/v1/jobs/{job.id}/events", headers=headers)
    finally:
        goes_on.set()
    assert job.task is not None
    await job.task


def _lose(coordinator: Coordinator) -> None:
    """While it answers."""
    answering = coordinator.remote

    def lost(request: ForwardedRequest) -> Answering:
        async def lists() -> AsyncGenerator[list[Message]]:
            async for messages in answering(request):
                yield [message for message in messages if message.get("more_body", True)]
                raise ActorUnavailableError("the actor is unavailable", b"0" * 16)

        return Answering(lists())

    coordinator.remote = lost  # type: ignore[method-assign]


async def _post(
    world: World, path: str, secret: str, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, httpx.Response]:
    """How many pieces of the body were read, and the answer."""
    taken = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(N_PIECES):
            taken += 1
            yield PIECE

    headers = {"content-type": "application/json", **headers}
    if secret:
        headers["authorization"] = f"Bearer {secret}"
    answer = await asyncio.wait_for(
        world.client.post(path, content=pieces(), headers=headers), timeout=60
    )
    return taken, answer
