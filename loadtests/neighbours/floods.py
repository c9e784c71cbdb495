"""Measures what floods of one tenant cost another tenant, in seconds.

    python -m loadtests.neighbours.floods [--seconds 30] [--out FILE]

A server with two keys. The bystander streams an answer, alone and beside each flood:

- `choices`: two calls with `n=64` and prompts of 5,900 tokens;
- `prompts`: four clients that send prompts of 5,900 tokens, one token of answer each;
- `vectors`: four calls for the embeddings of 512 texts of 1,000 words.

Another client of the bystander's key asks for one token at a time. The result has the stream's
rate and gaps, the waits for that one token, and the share of the stream's fair rate: with two
tenants of one weight, half of its rate alone.
"""

import argparse
import asyncio
import hashlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx

from loadtests.provenance import stamped
from loadtests.systems import Loraplex, Target, started
from loraplex_server.model.loading.pull import resolve_model

from .interference import spread

N_PROMPT, N_CHOICES, N_TEXTS = 5900, 64, 512
_TEXT = "/v1/completions"
_KEYS = ("flood", "bystander")
_VOCABULARY = range(1000, 40000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="Length of each phase.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        work = Path(folder)
        keys = work / "keys.toml"
        keys.write_text("\n".join(map(_key, _KEYS)))
        system = Loraplex({"keys": keys, "max-body-size": "64MiB"})
        with started(system, resolve_model(), [], work) as target:
            phases = measure(target, options.seconds)
    result = stamped({"phases": phases})
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(target: Target, seconds: float) -> dict[str, dict[str, object]]:
    """Return the numbers of each phase, by its name."""
    _stream(target.url, 3.0)  # first steps are slower
    phases: dict[str, dict[str, object]] = {"alone": _phase(target.url, seconds)}
    for name, send in (("choices", _choices), ("prompts", _prompts), ("vectors", _vectors)):
        with _flood(target.url, send):
            phases[name] = _phase(target.url, seconds)
        time.sleep(2.0)  # its requests are cancelled
    alone = phases["alone"]["tokens_per_s"]
    for phase in phases.values():
        phase["of_fair_rate"] = round(phase["tokens_per_s"] / (alone / 2), 2)  # type: ignore[operator]
    return phases


def _phase(url: str, seconds: float) -> dict[str, object]:
    waits: list[float] = []
    stop = threading.Event()
    asking = threading.Thread(target=_ask, args=(url, stop, waits))
    asking.start()
    gaps = _stream(url, seconds)
    stop.set()
    asking.join()
    return {
        "tokens_per_s": round(len(gaps) / seconds, 2),
        "gap_ms": spread(gaps),
        "one_token_ms": spread(waits),
    }


def _stream(url: str, seconds: float) -> list[float]:
    """Return the gaps of a stream that is read for some seconds, the time to its first included."""
    body = {"prompt": "Once upon a time", "max_tokens": 7000, "stream": True, "ignore_eos": True}
    gaps: list[float] = []
    began = last = time.perf_counter()
    with _client(url, "bystander") as client, client.stream("POST", _TEXT, json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            now = time.perf_counter()
            if line.startswith("data: {"):
                gaps.append(now - last)
                last = now
            if now - began > seconds:
                return gaps
    raise RuntimeError("the stream ended early")


def _ask(url: str, stop: threading.Event, waits: list[float]) -> None:
    body = {"prompt": "What is the capital of France?", "max_tokens": 1}
    with _client(url, "bystander") as client:
        while not stop.is_set():
            began = time.perf_counter()
            client.post(_TEXT, json=body).raise_for_status()
            waits.append(time.perf_counter() - began)
            stop.wait(1.0)


@contextmanager
def _flood(url: str, send: Callable[[str, int, threading.Event], None]) -> Iterator[None]:
    """Runs ``send`` in four threads during the block."""
    stop = threading.Event()
    threads = [threading.Thread(target=send, args=(url, number, stop)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _choices(url: str, number: int, stop: threading.Event) -> None:
    if number >= 2:
        return
    body = {**_long_prompt(number), "n": N_CHOICES, "max_tokens": 1000}
    while not stop.is_set():
        _send_until(stop, url, _TEXT, body)


def _prompts(url: str, number: int, stop: threading.Event) -> None:
    for index in count():
        if stop.is_set():
            return
        _send_until(stop, url, _TEXT, {**_long_prompt(10 + 4 * index + number), "max_tokens": 1})


def _vectors(url: str, number: int, stop: threading.Event) -> None:
    words = random.Random(number).choices(("river", "stone", "light", "house", "cloud"), k=1000)
    body = {"input": [f"{index} {' '.join(words)}" for index in range(N_TEXTS)]}
    while not stop.is_set():
        _send_until(stop, url, "/v1/embeddings", body)


def _long_prompt(seed: int) -> dict[str, object]:
    ids = random.Random(seed).choices(_VOCABULARY, k=N_PROMPT)
    return {"prompt": ids, "ignore_eos": True, "temperature": 1.0}


def _send_until(stop: threading.Event, url: str, path: str, body: dict[str, object]) -> None:
    """Send a request; drop it as soon as ``stop`` is set. A server cancels it then."""

    async def send() -> None:
        async with httpx.AsyncClient(
            base_url=url, headers=_headers("flood"), timeout=None
        ) as client:
            call = asyncio.create_task(client.post(path, json=body))
            while not call.done() and not stop.is_set():
                await asyncio.wait([call], timeout=0.2)
            call.cancel() if not call.done() else call.result().raise_for_status()

    asyncio.run(send())


def _client(url: str, name: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=_headers(name), timeout=600)


def _headers(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-secret"}


def _key(name: str) -> str:
    digest = hashlib.sha256(f"{name}-secret".encode()).hexdigest()
    return f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscope = "infer"\n'


if __name__ == "__main__":
    main()
