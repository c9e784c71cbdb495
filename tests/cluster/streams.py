"""Streams of a cluster's users, and what the cluster says of its replicas."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import httpx

from tests.cluster.conftest import ADMIN
from tests.support.servers.cluster_process import ClusterProcess

CHAT = "/v1/chat/completions"
_ENDED = "data: [DONE]"


class Streamed(NamedTuple):
    status: int
    n_tokens: int
    error: str | None  # code of the error event
    done: bool
    at: float  # when it ended, by the monotonic clock
    retry_after: str | None = None


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
        if answer.headers.get("content-type", "").startswith("text/plain"):
            answer.raise_for_status()  # Ray's proxy: the gateway died before it had answered
        if answer.status_code != 200:
            code = json.loads(await answer.aread())["error"]["code"]
            later = answer.headers.get("retry-after")
            return Streamed(answer.status_code, 0, code, False, time.monotonic(), later)
        async for line in lines_of(answer):
            if line == _ENDED:
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
    limits = httpx.Limits(max_connections=None)
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


def wrong(answers: Sequence[Streamed], n_tokens: int) -> list[Streamed]:
    return [
        a for a in answers if (a.status, a.n_tokens, a.error, a.done) != (200, n_tokens, None, True)
    ]


async def engines_of(client: httpx.AsyncClient) -> list[Any]:
    """What the replicas say, asked since the call: gateways ask them once a second."""
    since = time.monotonic()
    while True:
        sent = time.monotonic()
        answer = (await client.get("/v1/cluster")).raise_for_status().json()
        if answer["cluster"]["age_s"] < sent - since:
            return list(answer["cluster"]["engines"])
        await asyncio.sleep(0.1)


async def taken_by(client: httpx.AsyncClient, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Adapter → replica → requests that it has taken."""
    engines = await engines_of(client)
    return {
        name: {
            engine["replica"]: adapter["requests"]
            for engine in engines
            for adapter in engine["adapters"]
            if adapter["name"] == name
        }
        for name in names
    }
