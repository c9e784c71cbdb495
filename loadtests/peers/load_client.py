"""A closed-loop streaming client for any OpenAI-compatible completions endpoint."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtests.recorder import percentile

__all__ = ["LoadResult", "run_load"]

_TEXT = (
    "the server keeps one frozen base model in memory and applies a different adapter to every "
    "request in the batch while new adapters are loaded in the background without stopping "
    "anybody who is already reading"
)
_WORDS = _TEXT.split()


@dataclass
class LoadResult:
    """Seconds and tokens of the counted requests; the warm-up is left out."""

    n_requests: int
    wall_s: float = 0.0
    n_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.n_requests,
            "errors": len(self.errors),
            "first_error": self.errors[0] if self.errors else None,
            "output_tok_s": round(self.n_tokens / self.wall_s, 1) if self.wall_s else None,
            "ttft_p50_s": percentile(self.ttft_s, 50),
            "ttft_p99_s": percentile(self.ttft_s, 99),
            "itl_p50_ms": _milliseconds(percentile(self.gaps_s, 50)),
            "itl_p99_ms": _milliseconds(percentile(self.gaps_s, 99)),
        }


def run_load(
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    *,
    n_requests: int,
    n_warmup: int,
    concurrency: int,
    prompt_chars: int,
    max_tokens: int,
    on_done: Callable[[], None] = lambda: None,
) -> LoadResult:
    """``bodies[i % len(bodies)]`` is what request i adds to the common fields (model, adapter …).

    Prompts are unique, so that no prefix cache helps anybody.
    """
    return asyncio.run(
        _run(url, bodies, n_requests, n_warmup, concurrency, prompt_chars, max_tokens, on_done)
    )


async def _run(
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    n_requests: int,
    n_warmup: int,
    concurrency: int,
    prompt_chars: int,
    max_tokens: int,
    on_done: Callable[[], None],
) -> LoadResult:
    salt = time.time_ns()
    places = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency + 4)

    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one(index: int, result: LoadResult) -> None:
            k = index % len(_WORDS)
            text = " ".join((_WORDS[k:] + _WORDS[:k]) * 8)[:prompt_chars]
            body = {
                "prompt": f"{salt}-{index} {text}",
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                **bodies[index % len(bodies)],
            }
            async with places:
                await _stream(client, url, body, result)
            on_done()

        await asyncio.gather(*(one(i, LoadResult(0)) for i in range(n_warmup)))
        result = LoadResult(n_requests)
        start = time.perf_counter()
        await asyncio.gather(*(one(n_warmup + i, result) for i in range(n_requests)))
        result.wall_s = time.perf_counter() - start
    return result


async def _stream(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], result: LoadResult
) -> None:
    sent = time.perf_counter()
    last: float | None = None
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread())[:200].decode(errors="replace")
                result.errors.append(f"{response.status_code}: {text}")
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                now = time.perf_counter()
                if event.get("usage"):
                    result.n_tokens += event["usage"]["completion_tokens"]
                if event.get("choices"):
                    if last is None:
                        result.ttft_s.append(now - sent)
                    else:
                        result.gaps_s.append(now - last)
                    last = now
    except httpx.HTTPError as error:
        result.errors.append(repr(error)[:200])


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
