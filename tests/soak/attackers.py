"""Hostile clients beside the others: each attack once stalled, filled or degraded a server.

An attacker may be refused, cut off or answered. A server error is a violation, and so is whatever
the other clients of ``chaos`` see of it.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack, suppress
from urllib.parse import urlsplit

import httpx
import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from .chaos import Act, Chaos

_N_SOCKETS = 1100  # above the server's --max-connections
_HELD_S = 3.0
_LONG = list(range(10, 290)) * 10  # token ids of a prompt
_MIB = 1 << 20
_NOISE = torch.Generator().manual_seed(0)


class Attackers:
    """Attack the server of ``chaos``. Close it after its acts were cancelled."""

    def __init__(self, chaos: Chaos, base: PreTrainedModel) -> None:
        self._chaos = chaos
        self._client = httpx.AsyncClient(timeout=120.0)
        # Noise on every weight: a change of full rank.
        state = base.state_dict()
        changed = {
            key: weight + 0.1 * torch.randn(weight.shape, generator=_NOISE)
            for key, weight in state.items()
        }
        self._fine_tune = {"config": b'{"peft_type": "FULL"}', "weights": save(changed)}

    def acts(self) -> Sequence[tuple[Act, float]]:
        """Return the attacks, each with the seconds between two of them."""
        return [
            (self.trailers, 10.0),
            (self.idle_sockets, 15.0),
            (self.unfinished_uploads, 10.0),
            (self.blank_lines, 15.0),
            (self.fine_tune, 15.0),
            (self.many_texts, 15.0),
            (self.deep_json, 2.0),
            (self.many_choices, 10.0),
            (self.learn, 30.0),
            (self.other_site, 5.0),
        ]

    async def close(self) -> None:
        await self._client.aclose()

    async def trailers(self, choices: random.Random) -> None:
        """Send a trailer that does not end."""
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: "
        await self._send_raw(head, [b"b" * 65536] * 500)

    async def idle_sockets(self, choices: random.Random) -> None:
        """Hold as many connections as the server accepts."""
        head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        async with AsyncExitStack() as stack:
            stack.enter_context(self._chaos.crowded())
            for _ in range(_N_SOCKETS):
                with suppress(OSError):
                    _, writer = await self._connect()
                    stack.push_async_callback(_close, writer)
                    writer.write(head)
            await asyncio.sleep(_HELD_S)

    async def unfinished_uploads(self, choices: random.Random) -> None:
        """Begin eight uploads of a gigabyte."""
        head = (
            b"PUT /v1/adapters/huge HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            b'Content-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        )
        sending = (self._send_raw(head, [bytes(65536)] * 32, held_s=_HELD_S) for _ in range(8))
        await asyncio.gather(*sending)

    async def blank_lines(self, choices: random.Random) -> None:
        """Upload a file of calls that is almost empty."""
        call = {"custom_id": "1", "method": "POST", "url": "/v1/completions"}
        line = json.dumps(call | {"body": {"model": "base", "prompt": "x"}}).encode()
        files = {"file": ("calls.jsonl", b"\n" * (16 * _MIB) + line), "purpose": (None, b"batch")}
        answer = await self._send("POST", "/v1/files", files=files)
        if answer is not None and answer.is_success:
            await self._send("DELETE", f"/v1/files/{answer.json()['id']}")

    async def fine_tune(self, choices: random.Random) -> None:
        """Upload a full fine-tune, which takes a decomposition of every weight."""
        await self._send("PUT", "/v1/adapters/full", files=self._fine_tune)

    async def many_texts(self, choices: random.Random) -> None:
        body = {"model": "base", "input": [f"text {number}" for number in range(2048)]}
        await self._send("POST", "/v1/embeddings", json=body)

    async def deep_json(self, choices: random.Random) -> None:
        """Send a value nested more deeply than a stack."""
        depth = choices.choice((130, 300, 1000))
        deep = '{"a":' * depth + "1" + "}" * depth
        schema = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {deep}}}}}'
        message = '"model": "base", "messages": [{"role": "user", "content": "x"}]'
        path, body = choices.choice(
            (
                ("/v1/chat/completions", f'{{{message}, "response_format": {schema}}}'),
                ("/v1/chat/completions", f'{{{message}, "guided_json": {deep}}}'),
                ("/v1/completions", f'{{"model": "base", "prompt": "x", "metadata": {deep}}}'),
            )
        )
        await self._send("POST", path, content=body, headers={"content-type": "application/json"})

    async def many_choices(self, choices: random.Random) -> None:
        body = {"model": "base", "prompt": _LONG, "n": 64, "max_tokens": 8, "ignore_eos": True}
        await self._send("POST", "/v1/completions", json=body)

    async def learn(self, choices: random.Random) -> None:
        """Occupy the trainer."""
        pair = {"prompt": "hello", "answer": "there"}
        body = {"name": "learnt", "examples": [pair] * 20, "budget_s": 2, "replace": True}
        await self._send("POST", "/v1/adapters/train", json=body)

    async def other_site(self, choices: random.Random) -> None:
        """Name another host in a path that is not quite a route."""
        headers = {"host": "evil.example"}
        answer = await self._send("POST", "/v1/chat/completions/", json={}, headers=headers)
        if answer is not None and "evil" in answer.headers.get("location", ""):
            self._chaos.violation("a redirect to a host that the client named")

    async def _send(self, method: str, path: str, **options: object) -> httpx.Response | None:
        """Return the answer, or None if the server cut the attacker off."""
        url = self._chaos.url + path
        try:
            answer = await self._client.request(method, url, **options)  # type: ignore[arg-type]
        except httpx.TransportError:
            self._chaos.counts["attacks cut off"] += 1
            return None
        self._chaos.counts["attacks"] += 1
        if answer.status_code >= 500:
            is_told_when = "retry-after" in answer.headers
            if answer.status_code != 503 or not is_told_when:
                self._chaos.violation(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    async def _send_raw(self, head: bytes, parts: Sequence[bytes], held_s: float = 0.0) -> None:
        self._chaos.counts["attacks"] += 1
        with suppress(OSError):
            _, writer = await self._connect()
            try:
                for part in (head, *parts):
                    writer.write(part)
                    await asyncio.wait_for(writer.drain(), _HELD_S)
                await asyncio.sleep(held_s)
            finally:
                await _close(writer)

    def _connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        parts = urlsplit(self._chaos.url)
        return asyncio.open_connection(parts.hostname, parts.port)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()
