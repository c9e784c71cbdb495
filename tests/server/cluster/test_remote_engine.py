"""A gateway's side of an engine replica: what is tried again, what ends, what is counted."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Message

ray = pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from ray.exceptions import ActorUnavailableError, RayTaskError  # noqa: E402

from loraplex_adapter_store.base_spec import BaseSpec  # noqa: E402
from loraplex_generation.errors import OutOfDistribution  # noqa: E402
from loraplex_generation.request import AdapterGenerationRequest  # noqa: E402
from loraplex_server.adapters.learning.learning import LearningRequest, LearningResult  # noqa: E402
from loraplex_server.cluster.gateway.coordinator import (  # noqa: E402
    KeyLimits,
    SharedMeter,
    result_or_error,
)
from loraplex_server.cluster.gateway.forwarding import (  # noqa: E402
    BodyPiece,
    ForwardedBodies,
    ForwardedRequest,
    answer_forwarded,
)
from loraplex_server.cluster.gateway.remote_engine import RemoteEngine  # noqa: E402
from loraplex_server.cluster.replica.engine_facts import (  # noqa: E402
    EngineFacts,
    find_facts,
    fingerprint_of,
    model_of,
)
from loraplex_server.cluster.replica.remote_request import ReplicaStats  # noqa: E402
from loraplex_server.engine.adapters.capabilities import EngineCapabilities  # noqa: E402
from loraplex_server.engine.errors import EngineDead, QueueFull  # noqa: E402
from loraplex_server.engine.requests.client import EngineStats, GenerationRequest  # noqa: E402
from loraplex_server.engine.requests.events import FinishReason, TokenEvent  # noqa: E402
from loraplex_server.engine.requests.sampling_params import SamplingParams  # noqa: E402
from loraplex_server.errors import ApiError, from_store  # noqa: E402
from loraplex_server.settings.api_keys import EVERY_ADAPTER, ApiKey, Scope  # noqa: E402
from loraplex_server.settings.config import ServerConfig  # noqa: E402
from tests.support.bases.architectures import tiny_model  # noqa: E402

pytestmark = pytest.mark.anyio

Step = list[TokenEvent] | Exception | asyncio.Event  # an event is waited for
LOST = ActorUnavailableError("the actor is unavailable", b"0" * 16)
TOKEN = TokenEvent("elsewhere", (5,))
LAST = TokenEvent("elsewhere", (), finish=FinishReason.STOP)
WHOSE: ContextVar[str] = ContextVar("whose", default="nobody's")
REQUEST = GenerationRequest("mine", (1, 2, 3), SamplingParams(max_tokens=4))


class Streaming:
    """A response that takes the steps of a script."""

    def __init__(self, script: Sequence[Step]) -> None:
        self._script = iter(script)
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        for step in self._script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, list):
                return step
            await step.wait()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class Answers:
    def __init__(self, answers: Sequence[object]) -> None:
        self._answers = answers

    async def results_async(self, *, timeout_s: float) -> Sequence[object]:
        return self._answers


class Handle:
    """Of a deployment whose replicas answer with one script after another."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self._scripts = iter(scripts)
        self.responses: list[Streaming] = []
        self.contexts: list[str] = []

    def options(self, **given: object) -> Handle:
        return self

    def broadcast(self, method: str, *arguments: object) -> Answers:
        return Answers([ReplicaStats("one", EngineStats(n_running=3))])

    def remote(self, *arguments: object) -> Streaming:
        self.contexts.append(WHOSE.get())
        self.responses.append(Streaming(next(self._scripts)))
        return self.responses[-1]


@pytest.fixture(scope="module")
def facts() -> EngineFacts:
    spec = BaseSpec.of(tiny_model(), "tiny")
    capabilities = EngineCapabilities.of(spec)
    return EngineFacts("v1", "m1", spec, capabilities, frozenset({2}), 64, 256)


async def events_of(
    facts: EngineFacts,
    handle: Handle,
    after_submit: Callable[[RemoteEngine], None] = lambda engine: None,
) -> list[TokenEvent]:
    engine = RemoteEngine(handle, handle, facts)
    found: list[TokenEvent] = []
    ended = asyncio.Event()

    def listen(event: TokenEvent) -> None:
        found.append(event)
        if event.finish is not None:
            ended.set()

    engine.submit(REQUEST, listen)
    after_submit(engine)
    await asyncio.wait_for(ended.wait(), 60)
    await engine.close()
    return found


async def test_events_come_under_the_requests_own_id(facts: EngineFacts) -> None:
    events = await events_of(facts, Handle([[TOKEN], [TOKEN, LAST]]))
    assert [e.request_id for e in events] == ["mine"] * 3
    assert [e.finish for e in events] == [None, None, FinishReason.STOP]


async def test_a_choice_is_no_part_of_its_http_request_to_ray(facts: EngineFacts) -> None:
    """Ray tells requests within one context apart by nothing, and loses all but one of them."""
    WHOSE.set("one HTTP request's")
    handle = Handle([[LAST]])
    await events_of(facts, handle)
    assert handle.contexts == ["nobody's"]


async def test_a_request_without_output_is_tried_elsewhere(facts: EngineFacts) -> None:
    handle = Handle([LOST], [LOST], [[TOKEN, LAST]])
    events = await events_of(facts, handle)
    assert [e.token_ids for e in events] == [(5,), ()]
    assert len(handle.responses) == 3


async def test_a_request_is_tried_three_times_at_most(facts: EngineFacts) -> None:
    (last,) = await events_of(facts, Handle([LOST], [LOST], [LOST]))
    assert last.finish is FinishReason.ERROR
    assert isinstance(last.error, EngineDead)


async def test_a_replica_whose_engine_has_stopped_is_left_for_another(facts: EngineFacts) -> None:
    dead = TokenEvent("x", (), finish=FinishReason.ERROR, error=EngineDead("stopped"))
    events = await events_of(facts, Handle([[dead]], [[TOKEN, LAST]]))
    assert [e.token_ids for e in events] == [(5,), ()]


async def test_an_answer_without_an_end_gets_one(facts: EngineFacts) -> None:
    first, last = await events_of(facts, Handle([[TOKEN]]))
    assert first.token_ids == (5,)
    assert isinstance(last.error, EngineDead)


async def test_a_request_with_output_ends_when_its_replica_is_lost(facts: EngineFacts) -> None:
    handle = Handle([[TOKEN], LOST])
    first, last = await events_of(facts, handle)
    assert first.token_ids == (5,)
    assert isinstance(last.error, EngineDead)
    assert len(handle.responses) == 1


async def test_no_traceback_of_a_replica_reaches_a_client(facts: EngineFacts) -> None:
    failed = RayTaskError("generate", "Traceback: /srv/secret.py", ValueError("/srv/secret"))
    (last,) = await events_of(facts, Handle([failed]))
    assert last.error is not None
    assert "/srv" not in str(last.error)


async def test_what_a_replica_refuses_is_the_last_event(facts: EngineFacts) -> None:
    full = TokenEvent("x", (), finish=FinishReason.ERROR, error=QueueFull("full", 2.0))
    (last,) = await events_of(facts, Handle([[full]]))
    assert last == replace(full, request_id="mine")


async def test_a_request_may_come_again_as_soon_as_it_was_refused(facts: EngineFacts) -> None:
    full = TokenEvent("x", (), finish=FinishReason.ERROR, error=QueueFull("full", 2.0))
    handle = Handle([[full]], [[TOKEN, LAST]])
    engine = RemoteEngine(handle, handle, facts)
    found: list[TokenEvent] = []
    ended = asyncio.Event()

    def listen(event: TokenEvent) -> None:
        found.append(event)
        if event.error is not None:
            engine.submit(REQUEST, listen)
        elif event.finish is not None:
            ended.set()

    engine.submit(REQUEST, listen)
    await asyncio.wait_for(ended.wait(), 60)
    await engine.close()
    assert [event.token_ids for event in found] == [(), (5,), ()]


@pytest.mark.parametrize("n_turns", [0, 1, 5])
async def test_a_cancelled_request_ends_once_whenever_it_is_cancelled(
    facts: EngineFacts, n_turns: int
) -> None:
    handle = Handle([asyncio.Event()])

    def cancel(engine: RemoteEngine) -> None:
        async def later() -> None:
            for _ in range(n_turns):
                await asyncio.sleep(0)
            engine.cancel("mine")

        if n_turns:
            cancelling.append(asyncio.ensure_future(later()))
        else:
            engine.cancel("mine")

    cancelling: list[Any] = []
    (last,) = await events_of(facts, handle, cancel)
    assert last.finish is FinishReason.CANCELLED
    assert all(response.cancelled for response in handle.responses)


async def test_a_gateway_asks_until_the_facts_are_of_its_own_version(facts: EngineFacts) -> None:
    """In an upgrade replicas before it run, too, and the router may choose one of them."""
    before = ServerConfig()
    after = before.model_copy(
        update={"engine": before.engine.model_copy(update={"max_model_len": 128})}
    )
    old = replace(facts, config=fingerprint_of(before))
    new = replace(facts, config=fingerprint_of(after), max_model_len=128)
    turns: list[Sequence[object] | Exception] = [LOST, [old], [old, new]]  # what all replicas say

    class Upgrading(Handle):
        async def remote(self, *arguments: object) -> Any:
            return old

        def broadcast(self, method: str, *arguments: object) -> Any:
            said = turns.pop(0)
            if isinstance(said, Exception):
                raise said
            return Answers(said)

    assert await find_facts(Upgrading(), Upgrading(), after, any_version=False) == new
    assert not turns
    found = await find_facts(Upgrading(), Upgrading(), before, any_version=False)
    assert found == old  # asks nobody else


async def test_the_coordinator_does_not_wait_for_engines_that_may_never_start(
    facts: EngineFacts,
) -> None:
    """What follows from engine options is that of the options that will be."""
    before = ServerConfig()
    options = before.engine.model_copy(update={"max_lora_rank": 8})
    after = before.model_copy(update={"engine": options})
    old = replace(facts, config=fingerprint_of(before), model=model_of(before))

    class Before(Handle):
        async def remote(self, *arguments: object) -> Any:
            return old

    found = await asyncio.wait_for(find_facts(Before(), Before(), after, any_version=True), 10)
    assert found.base is old.base
    assert found.capabilities == replace(old.capabilities, max_rank=8)
    assert found.max_model_len == 256  # the base's own: no option says less any more
    assert await find_facts(Before(), Before(), before, any_version=True) == old


async def test_the_coordinator_takes_no_facts_of_another_model(facts: EngineFacts) -> None:
    other = replace(facts, model=model_of(ServerConfig(model="another")))
    own = replace(facts, model=model_of(ServerConfig()))

    class Both(Handle):
        async def remote(self, *arguments: object) -> Any:
            return other

        def broadcast(self, method: str, *arguments: object) -> Any:
            return Answers([other, own])

    found = await asyncio.wait_for(find_facts(Both(), Both(), ServerConfig(), any_version=True), 10)
    assert found.model == own.model


async def test_the_snapshot_is_that_of_the_replicas(facts: EngineFacts) -> None:
    engine = RemoteEngine(Handle(), Handle(), facts)
    while not engine.replicas:
        await asyncio.sleep(0)
    assert engine.stats().n_running == 3
    await engine.close()


async def test_whoever_has_unloaded_sees_it_in_the_snapshot(facts: EngineFacts) -> None:
    """The other snapshots are a second apart."""

    class Holding(Handle):
        n_bytes = 5

        def broadcast(self, method: str, *arguments: object) -> Any:
            if method == "unload":
                freed, self.n_bytes = self.n_bytes, 0
                return Answers([freed])
            stats = EngineStats(resident_bytes={"a": self.n_bytes})
            return Answers([ReplicaStats("one", stats)])

    engine = RemoteEngine(Handle(), Holding(), facts)
    while not engine.replicas:
        await asyncio.sleep(0)
    assert engine.stats().resident_bytes == {"a": 5}
    assert await engine.unload("a") == 5
    assert engine.stats().resident_bytes == {"a": 0}
    await engine.close()


class Counting:
    """A handle of a coordinator that is here, or does not answer."""

    def __init__(self, limits: KeyLimits, method: str = "") -> None:
        self.limits, self._method = limits, method
        self.is_lost = False
        self.parent = self

    def options(self, *, method_name: str) -> Counting:
        bound = Counting(self.limits, method_name)
        bound.parent = self.parent
        return bound

    async def remote(self, *arguments: Any) -> Any:
        if self.parent.is_lost:
            raise LOST
        assert self._method == "count_usage"
        return pickle.loads(pickle.dumps(await self.limits.count(*arguments)))


async def test_two_gateways_count_one_key_together_and_alone_while_the_count_is_lost() -> None:
    key = replace(ApiKey.of("limited-secret", Scope.INFER), requests_per_minute=4)
    handle = Counting(KeyLimits([key]))
    meters = [SharedMeter(key, handle), SharedMeter(key, handle)]
    for number in range(4):
        await meters[number % 2].check_request()  # takes none
        await meters[number % 2].take_request()
    for meter in meters:
        with pytest.raises(ApiError, match="4 requests a minute"):
            await meter.check_request()
        with pytest.raises(ApiError, match="4 requests a minute"):
            await meter.take_request()
    assert meters[0].headers()["x-ratelimit-remaining-requests"] == "0"
    handle.is_lost = True
    for meter in meters:  # each has its own count now, which is full
        for _ in range(4):
            await meter.take_request()
        with pytest.raises(ApiError):
            await meter.take_request()
    handle.is_lost = False
    with pytest.raises(ApiError):
        await meters[0].take_request()  # counted together again


async def test_an_answer_that_is_passed_on_streams_and_ends_when_its_client_leaves() -> None:
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent = await Request(scope, receive).body()

        async def body() -> AsyncIterator[bytes]:
            try:
                yield sent
                yield b"more"
                await asyncio.Event().wait()
            finally:
                left.set()

        await StreamingResponse(body())(scope, receive, send)

    fields = {"http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/files",
              "raw_path": b"/v1/files", "query_string": b"", "headers": []}  # fmt: skip
    request = ForwardedRequest("req-1", fields, None, BodyPiece(b"sent", more=False))
    lists = answer_forwarded(app, request, ForwardedBodies())
    messages: list[Message] = []
    while not any(m.get("body") == b"more" for m in messages):
        messages += await anext(lists)
    assert messages[0]["status"] == 200
    assert messages[1]["body"] == b"sent"
    await lists.aclose()
    assert left.is_set()


async def test_an_error_of_the_process_that_learns_is_the_same_at_the_gateway() -> None:
    refused = OutOfDistribution(0.9, 0.5, [("card.de/plain", 0.1)])

    async def refuses(order: LearningRequest) -> LearningResult:
        raise refused

    generation = AdapterGenerationRequest("x", examples=(("a", "A"), ("b", "B")))
    order = LearningRequest(generation, EVERY_ADAPTER, wait=False, needs_adapter=True)
    answer = await result_or_error(refuses, order)
    assert isinstance(answer, ApiError)
    come: ApiError = pickle.loads(pickle.dumps(answer))
    assert come.body() == from_store(refused).body()
    assert come.status == 422
