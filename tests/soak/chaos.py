"""Clients that do everything at once to one server, and hold each answer to what it must be."""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import httpx

from loraplex_server.limited_http import BODY_CHECK_S, HEAD_S

from .ledger import GONE, Ledger
from .marked import Content

Act = Callable[[random.Random], Awaitable[None]]

_N_TOKENS = 8
_N_SHOWN = 20
_LONGEST_S = 120.0  # of a request: longer is a request that hangs
_DEADLINE_S = min(HEAD_S, BODY_CHECK_S)  # the server may hang up on who sends for longer
_RECOVERY_S = 5.0  # after a fault; the catalogue is asked again after two seconds
_HEALTHY_S = 75.0  # after a fault: /health forgets a part that was not used since
_BEGAN: ContextVar[float] = ContextVar("_BEGAN")  # when the act that runs began
_BAD_BODIES: Sequence[object] = (
    {},
    {"model": "base"},
    {"model": "base", "prompt": 7.5},
    {"model": "no such model", "prompt": "x"},
    {"model": "base", "prompt": "x", "adapter": {"name": "../../etc/passwd"}},
    {"model": "base", "prompt": "x", "adapter": [{"name": "a0", "weight": "heavy"}]},
    {"model": "base", "prompt": "x", "max_tokens": -1},
    {"model": "base", "prompt": "x", "temperature": "hot"},
    {"model": "base", "prompt": "x", "stop": ["y"] * 1000},
    {"model": "base", "prompt": "word " * 60000},
    {"model": "base", "prompt": [999999]},
)


class Sending:
    """The time in which a request was on its way to the server, by httpcore's trace."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._ended: float | None = None

    async def trace(self, step: str, info: Mapping[str, object]) -> None:
        if self._began is None:
            self._began = time.monotonic()  # of its connection, or of its head on an open one
        if step == "http11.send_request_body.complete":
            self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the seconds until the request was sent whole, or until now."""
        now = time.monotonic()
        return (self._ended or now) - (self._began or now)


class Chaos:
    """``url`` is the server's at the moment; ``is_away`` while it is being restarted."""

    def __init__(self, contents: Sequence[Content], names: list[str], seed: int) -> None:
        self.url = ""
        self.is_away = True
        self.left_at = 0.0  # when it last went away
        self._is_failing = False  # the disk or the catalogue
        self._failed_at = float("-inf")  # when it last did
        self._is_crowded = False  # by connections, so that the server closes idle ones
        self._crowded_at = float("-inf")  # when it last was
        self.longest_look_s = 0.0
        self.ledger = Ledger(names)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._contents, self._names, self._seed = contents, names, seed
        self._client = httpx.AsyncClient(
            timeout=_LONGEST_S,
            limits=httpx.Limits(max_connections=200),
            event_hooks={"request": [_watch_sending]},
        )

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Allow refusals in the block, and shortly afterwards: the machine fails the server."""
        self._is_failing = True
        try:
            yield
        finally:
            self._is_failing, self._failed_at = False, time.monotonic()

    @contextmanager
    def crowded(self) -> Iterator[None]:
        """Allow connections without a key to break in the block: the oldest idle one is closed.

        A client may send a request at the very moment when its kept-alive connection is closed.
        """
        self._is_crowded = True
        try:
            yield
        finally:
            self._is_crowded, self._crowded_at = False, time.monotonic()

    async def run(self, n_askers: int, attacks: Sequence[tuple[Act, float]]) -> None:
        """Run until cancelled. ``attacks``: further acts, each with the seconds between two."""
        acts: list[tuple[Act, float]] = [
            *attacks,
            *[(self.ask, 0.0)] * n_askers,
            *[(self.change, 0.2)] * 3,
            (self.leave, 0.2),
            (self.send_nonsense, 0.2),
            (self.upload_nonsense, 1.0),
            (self.generate, 3.0),
            (self.flood, 10.0),
            (self.look, 2.0),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for number, (act, pause_s) in enumerate(acts):
                    group.create_task(
                        self._repeat(act, pause_s, random.Random(self._seed + number))
                    )
        finally:
            await self._client.aclose()

    async def _repeat(
        self,
        act: Act,
        pause_s: float,
        choices: random.Random,
    ) -> None:
        while True:
            if self.is_away:
                await asyncio.sleep(0.05)
                continue
            _BEGAN.set(time.monotonic())
            try:
                await act(choices)
            except httpx.TransportError as error:
                self._broken(act.__name__, error)
            await asyncio.sleep(pause_s * choices.uniform(0.5, 1.5))

    async def ask(self, choices: random.Random) -> None:
        name, since = choices.choice(self._names), time.monotonic()
        body = {
            "model": "base",
            "adapter": name,
            "prompt": "".join(choices.choices("abcdef ghij", k=choices.randint(1, 80))),
            "max_tokens": _N_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if choices.random() < 0.3:
            tokens = await self._streamed(body, name, since)
        else:
            answer = await self._post("/v1/completions", body)
            if not self._is_answered(answer, name, since):
                return
            tokens = answer.json()["choices"][0]["token_ids"]
        if tokens is not None:
            self._check_mark(tokens, name, since)

    async def _streamed(self, body: dict[str, object], name: str, since: float) -> list[int] | None:
        tokens: list[int] = []
        body = {**body, "stream": True}
        async with self._client.stream("POST", self.url + "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._is_answered(answer, name, since)
                return None
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return tokens
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                if event.get("error", {}).get("code") == "adapter_not_found":
                    self._check_missing(name, since, line)  # after 10 s of waiting
                    return None
                if "error" in event:
                    self._refused(503, event["error"], "a stream", is_told_when=True)
                    return None
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or ()
        raise httpx.RemoteProtocolError("a stream ended without [DONE]", request=answer.request)

    def _check_mark(self, tokens: list[int], name: str, since: float) -> None:
        self.counts["answers"] += 1
        marks = self.ledger.possible(name, since)
        if len(tokens) != _N_TOKENS or len(set(tokens)) != 1 or tokens[0] not in marks:
            self.violation(f"{name} answered {tokens}; its mark may be one of {marks}")

    def _is_answered(self, answer: httpx.Response, name: str, since: float) -> bool:
        if answer.status_code == 404:
            self._check_missing(name, since, answer.text)
            return False
        return self._is_fine(answer, f"a request to {name}")

    def _check_missing(self, name: str, since: float, text: str) -> None:
        self.counts["not there"] += 1
        if GONE not in self.ledger.possible(name, since):
            self.violation(f"{name} is lost: {text[:200]}")

    async def change(self, choices: random.Random) -> None:
        """Puts, replaces, deletes: one change of a name at a time."""
        free = [name for name in self._names if name not in self.ledger.busy]
        if not free:
            return
        name = choices.choice(free)
        if choices.random() < 0.75:
            content = choices.choice(self._contents)
            files = {"config": content.config, "weights": content.weights}
            self.ledger.begin(name, content.mark)
            sent = self._client.put(f"{self.url}/v1/adapters/{name}", files=files)
        else:
            self.ledger.begin(name, GONE)
            sent = self._client.delete(f"{self.url}/v1/adapters/{name}?timeout_s=5")
        try:
            answer = await sent
        except BaseException:
            self.ledger.lose_touch(name)
            raise
        is_delete = answer.request.method == "DELETE"
        if answer.is_success or (is_delete and answer.status_code == 404):
            self.ledger.acknowledge(name)
            self.counts["deletes" if is_delete else "puts"] += 1
        elif self._was_away():
            self.ledger.lose_touch(name)
        elif answer.status_code == 503 and self._was_failing():
            self.ledger.lose_touch(name)  # the change may have been written before the failure
            self._is_fine(answer, f"a change of {name}")
        else:
            self.ledger.refuse(name)
            self._is_fine(answer, f"a change of {name}")

    async def leave(self, choices: random.Random) -> None:
        """Hangs up at the first bytes of a long answer."""
        body = {
            "model": "base",
            "adapter": choices.choice(self._names),
            "prompt": "hello",
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        }
        async with self._client.stream("POST", self.url + "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                break
        self.counts["left"] += 1

    async def send_nonsense(self, choices: random.Random) -> None:
        answer = await self._post("/v1/completions", choices.choice(_BAD_BODIES))
        self._must_be_refused(answer, "a bad body")

    async def upload_nonsense(self, choices: random.Random) -> None:
        """A real adapter with a part cut off or bytes turned."""
        content = choices.choice(self._contents)
        weights = bytearray(content.weights)
        if choices.random() < 0.5:
            del weights[choices.randrange(len(weights) - 1) :]
        else:
            weights[: 8 + choices.randrange(64)] = choices.randbytes(8 + choices.randrange(64))
        files = {"config": content.config, "weights": bytes(weights)}
        answer = await self._client.put(f"{self.url}/v1/adapters/bad", files=files)
        self._must_be_refused(answer, "a broken adapter")

    async def generate(self, choices: random.Random) -> None:
        """The generator that is shipped was not trained for this base: a clear refusal."""
        body = {"description": f"translates to French {choices.random()}", "probe": False}
        self._must_be_refused(await self._post("/v1/adapters/generate", body), "a description")

    async def flood(self, choices: random.Random) -> None:
        """Eighty requests at once, over all adapters."""
        asked = (self.ask(choices) for _ in range(80))
        for error in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(error, httpx.TransportError):
                self._broken("flood", error)
            elif error is not None:
                raise error
        self.counts["floods"] += 1

    async def look(self, choices: random.Random) -> None:
        for path in ("/health", "/metrics", "/v1/adapters", "/v1/models"):
            began = time.monotonic()
            answer = await self._client.get(self.url + path)
            self.longest_look_s = max(self.longest_look_s, time.monotonic() - began)
            is_told = self._is_fine(answer, path) and path == "/health"
            if is_told and "degraded" in answer.text and not self._was_failing(_HEALTHY_S):
                self.violation(f"/health: {answer.text}")

    async def find_all(self) -> None:
        """Check after a start that each name is as acknowledged or as last requested."""
        marks = await self._marks()
        listed = (await self._client.get(self.url + "/v1/adapters")).json()["data"]
        shown = {card["name"]: marks.get(card["digest"]) for card in listed}
        for name in self._names:
            if not self.ledger.find(name, shown.get(name, GONE)):
                self.violation(f"after a restart {name} has mark {shown.get(name, GONE)}")

    async def learn(self) -> None:
        """Upload every content once and note the mark of its digest."""
        self._digests: dict[str, int] = {}
        for content in self._contents:
            files = {"config": content.config, "weights": content.weights}
            put = await self._client.put(f"{self.url}/v1/adapters/learn", files=files)
            self._digests[put.raise_for_status().json()["digest"]] = content.mark
        (await self._client.delete(f"{self.url}/v1/adapters/learn")).raise_for_status()

    async def _marks(self) -> dict[str, int]:
        return self._digests

    async def _post(self, path: str, body: object) -> httpx.Response:
        return await self._client.post(self.url + path, json=body)

    def _must_be_refused(self, answer: httpx.Response, what: str) -> None:
        self.counts["refused"] += 1
        if answer.is_success:
            self.violation(f"{what} was accepted: {answer.request.content[:200]!r}")
        else:
            self._is_fine(answer, what, may_fail=True)

    def _is_fine(self, answer: httpx.Response, what: str, *, may_fail: bool = False) -> bool:
        """Return True for an answer. A refusal must be an allowed one."""
        if answer.is_success:
            return True
        error = answer.json().get("error", {})
        if answer.status_code < 500 and (may_fail or answer.status_code == 429):
            self.counts[f"{answer.status_code}"] += 1
        else:
            self._refused(answer.status_code, error, what, "retry-after" in answer.headers)
        return False

    def _refused(self, status: int, error: object, what: str, is_told_when: bool) -> None:
        """503 with Retry-After while server, disk or catalogue are not there, and nothing else."""
        self.counts[f"{status}"] += 1
        if not (status == 503 and is_told_when and (self._was_away() or self._was_failing())):
            self.violation(f"{what}: {status} {error}")

    def _broken(self, what: str, error: httpx.TransportError) -> None:
        """The connection broke. Only a server that went away meanwhile may do that, and one that
        was not sent the request within its deadlines, as these clients got no processor.
        """
        self.counts["broken"] += 1
        if self._was_away():
            return
        if self._is_crowded or self._crowded_at >= _BEGAN.get():
            self.counts["closed in a crowd"] += 1
            return
        sending: Sending = error.request.extensions["sending"]
        if sending.seconds >= _DEADLINE_S:
            self.counts["sent too slowly"] += 1
        else:
            self.violation(f"{what}: {error!r}, sent within {sending.seconds:.1f} s")

    def _was_away(self) -> bool:
        """Return True if the server was away at any time since this act began."""
        return self.is_away or self.left_at >= _BEGAN.get()

    def _was_failing(self, recovery_s: float = _RECOVERY_S) -> bool:
        """Return True if the machine failed at any time since shortly before this act began."""
        return self._is_failing or self._failed_at + recovery_s >= _BEGAN.get()

    def violation(self, text: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < _N_SHOWN:
            self.violations.append(text)
            print(f"\n{text}", file=sys.stderr)


async def _watch_sending(request: httpx.Request) -> None:
    sending = Sending()
    request.extensions = {**request.extensions, "sending": sending, "trace": sending.trace}
