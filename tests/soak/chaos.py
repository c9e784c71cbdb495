"""Clients that do everything at once to one server, and hold each answer to what it must be."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar

import httpx

from loraplex_server.limited_http import BODY_CHECK_S, HEAD_S

from .ledger import GONE, Ledger
from .marked import Content

__all__ = ["Chaos"]

_N_TOKENS = 8
_N_SHOWN = 20
_LONGEST_S = 120.0  # of a request: longer is a request that hangs
_DEADLINE_S = min(HEAD_S, BODY_CHECK_S)  # the server may hang up on who sends for longer
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
    """How long a request was on its way to the server: httpcore tells of each step."""

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
        """Until it was sent whole, or until now."""
        now = time.monotonic()
        return (self._ended or now) - (self._began or now)


class Chaos:
    """``url`` is the server's at the moment; ``is_away`` while it is being restarted."""

    def __init__(self, contents: Sequence[Content], names: list[str], seed: int) -> None:
        self.url = ""
        self.is_away = True
        self.left_at = 0.0  # when it last went away
        self.ledger = Ledger(names)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._contents, self._names, self._seed = contents, names, seed
        self._client = httpx.AsyncClient(
            timeout=_LONGEST_S,
            limits=httpx.Limits(max_connections=200),
            event_hooks={"request": [_watch_sending]},
        )

    async def run(self, n_askers: int) -> None:
        """Until it is cancelled."""
        acts: list[tuple[Callable[[random.Random], Awaitable[None]], float]] = [
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
        act: Callable[[random.Random], Awaitable[None]],
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
            self._violation(f"{name} answered {tokens}; its mark may be one of {marks}")

    def _is_answered(self, answer: httpx.Response, name: str, since: float) -> bool:
        if answer.status_code == 404:
            self.counts["not there"] += 1
            if GONE not in self.ledger.possible(name, since):
                self._violation(f"{name} is lost: {answer.text[:200]}")
            return False
        return self._is_fine(answer, f"a request to {name}")

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
            answer = await self._client.get(self.url + path)
            if self._is_fine(answer, path) and "degraded" in answer.text and path == "/health":
                self._violation(f"/health: {answer.text}")

    async def find_all(self) -> None:
        """After a start: each name must be as it was acknowledged, or as was last asked for."""
        marks = await self._marks()
        listed = (await self._client.get(self.url + "/v1/adapters")).json()["data"]
        shown = {card["name"]: marks.get(card["digest"]) for card in listed}
        for name in self._names:
            if not self.ledger.find(name, shown.get(name, GONE)):
                self._violation(f"after a restart {name} has mark {shown.get(name, GONE)}")

    async def learn(self) -> None:
        """Which digest has which mark: every content is put once."""
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
            self._violation(f"{what} was accepted: {answer.request.content[:200]!r}")
        else:
            self._is_fine(answer, what, may_fail=True)

    def _is_fine(self, answer: httpx.Response, what: str, *, may_fail: bool = False) -> bool:
        """Whether it is an answer; a refusal must be one that is allowed."""
        if answer.is_success:
            return True
        error = answer.json().get("error", {})
        if answer.status_code < 500 and (may_fail or answer.status_code == 429):
            self.counts[f"{answer.status_code}"] += 1
        else:
            self._refused(answer.status_code, error, what, "retry-after" in answer.headers)
        return False

    def _refused(self, status: int, error: object, what: str, is_told_when: bool) -> None:
        """503 while the server goes down or comes up, with Retry-After, and nothing else."""
        self.counts[f"{status}"] += 1
        if not (status == 503 and is_told_when and self._was_away()):
            self._violation(f"{what}: {status} {error}")

    def _broken(self, what: str, error: httpx.TransportError) -> None:
        """The connection broke. Only a server that went away meanwhile may do that, and one that
        was not sent the request within its deadlines, as these clients got no processor.
        """
        self.counts["broken"] += 1
        if self._was_away():
            return
        sending: Sending = error.request.extensions["sending"]
        if sending.seconds >= _DEADLINE_S:
            self.counts["sent too slowly"] += 1
        else:
            self._violation(f"{what}: {error!r}, sent within {sending.seconds:.1f} s")

    def _was_away(self) -> bool:
        """Whether the server was away at any time since this act began."""
        return self.is_away or self.left_at >= _BEGAN.get()

    def _violation(self, text: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < _N_SHOWN:
            self.violations.append(text)


async def _watch_sending(request: httpx.Request) -> None:
    sending = Sending()
    request.extensions = {**request.extensions, "sending": sending, "trace": sending.trace}
