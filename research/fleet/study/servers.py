"""Real servers for the simulator to be fitted to and checked against: a small random base, adapters
of several ranks, few places on the device and in host memory, so that every tier is used."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loadtests.random_adapters import write_lora
from loadtests.systems import BASE, Loraplex, Target, started
from research.fleet.traffic import RANKS
from tests.support.bases.tiny_tokenizer import tiny_tokenizer

CAPACITY, STEP_TOKENS = 8, 128
N_DEVICE, N_HOST_MIB = 12, 6
_VOCAB = 300


class Answer(NamedTuple):
    """Of one streamed completion."""

    ttft_ms: float
    token_ms: float  # mean time of a token after the first; 0 with one token
    n_cached: int  # prompt tokens found in the prefix cache


def save_base(folder: Path) -> None:
    """Four layers of width 256: small enough for a machine that others use too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@contextmanager
def fleet(work: Path, n_servers: int, n_adapters: int) -> Iterator[list[Target]]:
    """Running servers that share the folder of adapters ``a0``, ``a1``, … and nothing else."""
    save_base(work / "base")
    for number in range(n_adapters):
        rank = RANKS[number % len(RANKS)]
        write_lora(work / "base", work / "adapters" / f"a{number}", rank=rank, seed=number)
    options = {
        "adapters-dir": work / "adapters",
        "max-batch-size": CAPACITY,
        "max-step-tokens": STEP_TOKENS,
        "max-loras": N_DEVICE,
        "adapter-host-memory": f"{N_HOST_MIB}MiB",
        "threads": 1,
        "learning-threads": 0,
    }
    with ExitStack() as stack:
        targets = []
        for index in range(n_servers):
            (work / f"server-{index}").mkdir()
            targets.append(
                stack.enter_context(
                    started(Loraplex(options), work / "base", [], work / f"server-{index}")
                )
            )
        yield targets


async def ask(target: Target, adapter: str | None, prompt: Sequence[int], n_output: int) -> Answer:
    """Exactly ``n_output`` tokens. Raises RuntimeError for any answer but a complete stream."""
    body: dict[str, Any] = {
        "model": BASE,
        "prompt": list(prompt),
        "max_tokens": n_output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if adapter is not None:
        body["adapter"] = adapter
    payload = json.dumps(body).encode()
    host, _, port = target.url.removeprefix("http://").partition(":")
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(payload), payload)
        )
        await writer.drain()
        first = last = None
        n_cached, done, text = 0, False, b""
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                text += line if len(text) < 500 else b""
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            last = time.perf_counter()
            first = first or last
            event = json.loads(line[6:])
            if usage := event.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                n_cached = details.get("cached_tokens") or 0
    finally:
        writer.close()
    if not done or first is None or last is None:
        raise RuntimeError(f"{adapter} on {target.url}: {text.decode(errors='replace')}")
    token_ms = 1000 * (last - first) / (n_output - 1) if n_output > 1 else 0.0
    return Answer(1000 * (first - sent), token_ms, n_cached)


def load_average() -> float:
    return psutil.getloadavg()[0]
