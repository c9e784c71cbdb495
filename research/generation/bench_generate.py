"""From a sentence to an adapter that answers, on a real server with two threads.

    python -m research.generation.bench_generate [--n 40] [--out FILE]

- POST /v1/adapters/generate with descriptions that the server has not seen, with and without the
  probe prompts that measure how often the adapter agrees with the base; and by ICM-LoRA, which
  reads the base's states behind the description or before the answers of eight prompts;
- time to first token of a chat that brings a new description along, beside one that names an
  adapter which is resident; the two take turns, so that a slow minute slows both.

The descriptions are test wordings of training tasks: none was trained on. Prints and writes JSON.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles

import httpx

from loadtests.client import StreamingClient, admin_client
from loadtests.provenance import commit, machine
from loadtests.systems import Loraplex, started
from loraplex_server.model.loading.pull import resolve_model
from research.zoo.split import load_split
from research.zoo.tasks import Task

GENERATE = "/v1/adapters/generate"
PROMPT = "Anna Weber from Oslo paid {} euros on Friday."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=40, help="descriptions of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        system = Loraplex({"threads": 2})
        with (
            started(system, resolve_model(), [], Path(folder)) as target,
            admin_client(target.url) as server,
        ):
            result = measure(server, StreamingClient(target.url), options.n)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


UNLABELLED = [PROMPT.format(amount) for amount in range(2000, 2008)]


def measure(server: httpx.Client, chats: StreamingClient, n: int) -> dict[str, object]:
    fresh = descriptions()
    first_ms, _ = generate(server, fresh, probe=True)  # loads the generator
    bare = [generate(server, fresh, probe=False)[0] for _ in range(n)]
    probed = [generate(server, fresh, probe=True) for _ in range(n)]
    resident = probed[-1][1]
    first_token(chats, resident, 0)
    inline: list[float] = []
    named: list[float] = []
    while len(inline) < n:
        ms = first_token(chats, {"description": next(fresh)}, len(inline))
        if ms is not None:
            inline.append(ms)
            beside = first_token(chats, resident, 1000 + len(inline))
            assert beside is not None
            named.append(beside)
    by_icm: dict[str, list[float]] = {}
    for label, extra in (("description", {}), ("prompts", {"prompts": UNLABELLED})):
        order = {"method": "icm-lora", **extra}
        generate(server, fresh, probe=False, **order)  # the first loads the base's states
        by_icm[label] = [generate(server, fresh, probe=False, **order)[0] for _ in range(n)]
    return {
        "began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {**machine(), "threads": 2},
        "commit": commit(),
        "n": n,
        "first_description_of_the_server_ms": round(first_ms, 1),
        "generate_ms": spread([ms for ms, _ in probed]),
        "generate_without_probe_ms": spread(bare),
        "generate_icm_lora_ms": spread(by_icm["description"]),
        "generate_icm_lora_with_prompts_ms": spread(by_icm["prompts"]),
        "first_token_inline_ms": spread(inline),
        "first_token_resident_ms": spread(named),
        "inline_minus_resident_ms": round(median(inline) - median(named), 1),
    }


def descriptions() -> Iterator[str]:
    texts = [
        text for name in load_split().sets["train"] for text in Task.parse(name).test_descriptions()
    ]
    random.Random(0).shuffle(texts)
    yield from dict.fromkeys(texts)


def generate(
    server: httpx.Client, fresh: Iterator[str], *, probe: bool, **extra: object
) -> tuple[float, str]:
    """Milliseconds until the answer, and the adapter's name. Refused descriptions are passed."""
    while True:
        body = {"description": next(fresh), "probe": probe, **extra}
        began = time.perf_counter()
        response = server.post(GENERATE, json=body)
        ms = 1000 * (time.perf_counter() - began)
        if response.status_code == 201:
            return ms, str(response.json()["name"])
        if response.status_code != 422:
            text = response.text[:300]
            raise RuntimeError(f"POST {GENERATE} answered {response.status_code}: {text}")


def first_token(chats: StreamingClient, adapter: object, amount: int) -> float | None:
    """Milliseconds; None if the description is refused. `amount` makes the prompt a new one."""
    outcome = chats.stream(
        {
            "messages": [{"role": "user", "content": PROMPT.format(amount)}],
            "adapter": adapter,
            "stream": True,
            "temperature": 0,
            "max_tokens": 4,
        }
    )
    if outcome.status == 422:
        return None
    if outcome.error or outcome.ttft_s is None:
        raise RuntimeError(f"{adapter}: {outcome.error}")
    return 1000 * outcome.ttft_s


def spread(values: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(values, n=20)
    return {"p50": round(median(values), 1), "p95": round(cuts[-1], 1)}


if __name__ == "__main__":
    main()
