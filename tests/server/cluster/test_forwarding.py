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
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope
from transformers import PreTrainedTokenizerFast

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from ray.exceptions import ActorUnavailableError

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.put_options import Quota
from loraplex_server.adapters.learning.jobs import Progress
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.cluster.gateway.forwarding import (
    BodyPiece,
    ForwardedBodies,
    ForwardedRequest,
    answer_forwarded,
    with_forwarding,
)
from loraplex_server.services import parts_of
from loraplex_server.settings.api_keys import EVERY_ADAPTER, AdapterAccess, ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio

ADMIN, INFER, LIMITED, SMALL = "admin-secret", "infer-secret", "limited-secret", "small-secret"
PIECE, N_PIECES = bytes(1 << 16), 8
MIB = 1 << 20


class Answering:
    """An answer that ends when it is cancelled, as a generator of Ray's does."""

    def __init__(self, lists: AsyncGenerator[list[Message]]) -> None:
        self._lists = lists
        self.cancelling: asyncio.Task[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Message]]:
        return self._lists

    def cancel(self) -> None:
        self.cancelling = asyncio.ensure_future(self._lists.aclose())


class Coordinator:
    """A handle of the deployment whose application is here."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.asked: list[ForwardedRequest] = []
        self.pieces: list[BodyPiece] = []  # after the first of each request
        self.answers: list[Answering] = []
        self._bodies = ForwardedBodies()

    def options(self, *, method_name: str, **given: object) -> Any:
        return self if method_name == "answer" else _Pieces(self)

    def remote(self, request: ForwardedRequest) -> Answering:
        self.asked.append(request)
        answer = Answering(answer_forwarded(self.front.app, request, self._bodies))
        self.answers.append(answer)
        return answer

    async def put_piece(self, request_id: str, piece: BodyPiece) -> None:
        self.pieces.append(piece)
        self._bodies.put(request_id, piece)


class _Pieces:
    """A handle of the method that takes pieces of bodies."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.remote = coordinator.put_piece


_FORM_HEADERS = {"content-type": "multipart/form-data; boundary=b"}
_FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'


class World(NamedTuple):
    coordinator: Coordinator
    gateway: ASGIApp
    client: httpx.AsyncClient  # of the gateway


@pytest.fixture
def world(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[World]:
    limited = replace(ApiKey.of(LIMITED, Scope.INFER), requests_per_minute=1)
    access = AdapterAccess(tenant="small", quota=Quota(max_bytes=2 * MIB))
    small = replace(ApiKey.of(SMALL, Scope.INFER), tenant="small", access=access)
    keys = (ApiKey.of(ADMIN, Scope.ADMIN), ApiKey.of(INFER, Scope.INFER), limited, small)
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
    gateway = with_forwarding(front.app, coordinator, http, meter_of)
    transport = httpx.ASGITransport(gateway)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
    yield World(coordinator, gateway, client)
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
    assert world.coordinator.asked[0].body == (PIECE * N_PIECES, False)


async def test_what_may_be_as_large_as_an_adapter_is_not_forwarded(world: World) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    answer = await world.client.put("/v1/adapters/generate", content=PIECE, headers=headers)
    assert answer.status_code // 100 == 4
    assert not world.coordinator.asked


async def test_a_file_goes_to_the_coordinator_in_pieces_and_comes_back(world: World) -> None:
    call = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    line = {**call, "body": {"prompt": "x" * 100_000}}
    content = b"".join(
        json.dumps({**line, "custom_id": str(n)}).encode() + b"\n" for n in range(45)
    )
    headers = {"authorization": f"Bearer {INFER}"}
    form = httpx.Request("POST", "http://x", files={"file": content}, data={"purpose": "batch"})
    body = form.read()

    async def sent() -> AsyncIterator[bytes]:
        for at in range(0, len(body), len(PIECE)):
            yield body[at : at + len(PIECE)]

    kind = {"content-type": form.headers["content-type"]}
    stored = await world.client.post("/v1/files", content=sent(), headers=headers | kind)
    assert stored.status_code == 200, stored.text
    pieces = [world.coordinator.asked[0].body, *world.coordinator.pieces]
    assert len(pieces) == 5  # of 4.3 MiB
    assert max(len(piece.data) for piece in pieces) <= MIB + len(PIECE)
    assert [piece.more for piece in pieces] == [True] * 4 + [False]
    path = f"/v1/files/{stored.json()['id']}/content"
    assert (await world.client.get(path, headers=headers)).content == content


async def test_a_file_above_what_a_tenant_may_store_is_refused_while_it_arrives(
    world: World,
) -> None:
    n_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal n_sent
        yield _FORM
        while True:
            yield PIECE
            n_sent += len(PIECE)

    headers = {"authorization": f"Bearer {SMALL}", **_FORM_HEADERS}
    sending = world.client.post("/v1/files", content=endless(), headers=headers)
    answer = await asyncio.wait_for(sending, 60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_exceeded")
    assert n_sent <= 4 * MIB


async def test_an_upload_whose_client_leaves_in_the_middle_ends(world: World) -> None:
    state = parts_of(world.coordinator.front.app)
    n_received = 0
    goes = asyncio.Event()

    async def receive() -> Message:
        nonlocal n_received
        n_received += 1
        if n_received > 40:
            await goes.wait()
            return {"type": "http.disconnect"}
        return {
            "type": "http.request",
            "body": PIECE if n_received > 1 else _FORM,
            "more_body": True,
        }

    async def send(message: Message) -> None:
        raise AssertionError(message)

    headers = {"authorization": f"Bearer {INFER}", "host": "127.0.0.1", **_FORM_HEADERS}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/files",
        "raw_path": b"/v1/files",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    uploading = asyncio.ensure_future(world.gateway(scope, receive, send))
    tenant = ApiKey.of(INFER, Scope.INFER).tenant
    while state.arriving_files.of(tenant) < 2 * MIB:
        await asyncio.sleep(0)
    goes.set()
    await asyncio.wait_for(uploading, 60)
    cancelling = world.coordinator.answers[0].cancelling
    assert cancelling is not None
    await cancelling
    assert state.arriving_files.of(tenant) == 0


async def test_a_file_is_not_read_faster_than_it_is_taken() -> None:
    n_sent = 0

    async def endless(scope: ASGIScope, receive: Receive, send: Send) -> None:
        nonlocal n_sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            n_sent += len(PIECE)

    request = ForwardedRequest("id", {"path": "/"}, None, BodyPiece(b"", more=False))
    answer = answer_forwarded(endless, request, ForwardedBodies())
    n_taken = 0
    async for messages in answer:
        n_taken += sum(len(message.get("body", b"")) for message in messages)
        assert n_sent - n_taken <= 2 * MIB
        if n_taken > 8 * MIB:
            break
    await answer.aclose()


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
