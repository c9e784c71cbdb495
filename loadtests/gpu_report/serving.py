"""Compares rates and latencies with vLLM's for growing numbers of adapters."""

import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.baselines.vllm_gpu import VllmGpu
from loadtests.client import Outcome, StreamingClient
from loadtests.random_adapters import write_lora
from loadtests.systems import Loraplex, System, started

_PROMPT = "Write a long story about a lighthouse keeper who repairs clocks. "
_RANK = 8  # 256 adapters of it on all linears of 8 layers of an 8B take 3 GB of disk


@dataclass(frozen=True, slots=True)
class Load:
    """A serving comparison: groups of adapter counts, each served by one start."""

    groups: tuple[tuple[int, ...], ...]
    n_clients: int
    n_requests: int
    n_tokens: int  # of each answer
    n_sentences: int  # of each prompt, 66 tokens of a byte each


FULL_LOAD = Load(((0, 1, 16), (64,), (256,)), 64, 256, 128, 2)
SMALL_LOAD = Load(((0, 2),), 2, 4, 4, 1)


def compare_serving(
    folder: Path,
    *,
    kept: Path,
    model: Path,
    load: Load,
    dtype: str | None,
    deadline: float,
    vllm_venv: Path | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Yield the result so far after each number of adapters. ``kept`` has those of earlier runs.

    ``deadline``, of ``time.monotonic``: no server is started and no request sent later. Of a number
    of adapters that it cuts short the rates are those until then.
    """
    rows: list[Mapping[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    done = {(row["system"], row["adapters"]) for row in rows}
    result: dict[str, Any] = {
        "clients": load.n_clients,
        "tokens each": load.n_tokens,
        "rank of each adapter": _RANK,
        "rows": rows,
    }
    adapters: list[Path] = []
    for group in load.groups:
        if time.monotonic() > deadline:
            result[f"without {group[-1]} adapters"] = "the time was over"
            continue
        for i in range(len(adapters), max(group)):
            adapters.append(folder / "adapters" / f"lora-{i}")
            if not (adapters[-1] / "adapter_model.safetensors").exists():  # it is written last
                write_lora(model, adapters[-1], rank=_RANK, seed=i)
        for system in (Loraplex(), VllmGpu(vllm_venv, max_rank=_RANK)):
            wanted = [n for n in group if (system.name, n) not in done]
            if not wanted:
                continue
            why = "the time was over" if time.monotonic() > deadline else system.missing()
            if why is not None:
                result[f"without {system.name}"] = why
                continue
            try:
                with started(system, model, adapters, folder, dtype=dtype) as target:
                    for n_adapters in wanted:
                        names = [path.name for path in adapters[:n_adapters]] or [None]
                        n_warm = max(len(names), load.n_clients)
                        ask_all(target.url, system, names, load, n_warm, deadline)
                        began = time.perf_counter()
                        n = load.n_requests
                        outcomes = ask_all(target.url, system, names, load, n, deadline)
                        if not outcomes:
                            result[f"without {n_adapters} adapters"] = "the time was over"
                            break
                        numbers = serving_numbers(outcomes, time.perf_counter() - began)
                        rows.append({"adapters": n_adapters, "system": system.name, **numbers})
                        kept.write_text(json.dumps(rows), encoding="utf-8")
                        yield result
            except Exception as error:  # it does not come up, or breaks: the other one may not
                what = f"{system.name} with {group[-1]} adapters"
                result[what] = f"{type(error).__name__}: {error}"[-500:]
                yield result
            finally:
                for state in folder.glob("state-*"):  # a store of its own at every start: 11 GB
                    shutil.rmtree(state, ignore_errors=True)
    yield result


def serving_numbers(outcomes: Sequence[Outcome], seconds: float) -> Mapping[str, Any]:
    """Return rates and medians of the complete answers."""
    whole = [o for o in outcomes if o.error is None and o.status == 200 and o.ttft_s is not None]
    return {
        "answered": len(whole),
        "lost": len(outcomes) - len(whole),
        "tokens/s": sum(o.n_tokens for o in whole) / seconds,
        "TTFT ms": 1e3 * statistics.median([o.ttft_s for o in whole if o.ttft_s] or [0.0]),
        "TPOT ms": 1e3 * statistics.median([o.tpot_s for o in whole] or [0.0]),
    }


def ask_all(
    url: str,
    system: System,
    names: Sequence[str | None],
    load: Load,
    n_requests: int,
    deadline: float,
) -> list[Outcome]:
    """Return the outcomes: fewer than ``n_requests`` if ``deadline`` came first."""
    client, outcomes = StreamingClient(url), []
    numbers = iter(range(n_requests))
    lock = threading.Lock()
    prompt = _PROMPT * load.n_sentences

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or time.monotonic() > deadline:
                return
            outcome = client.stream(
                {
                    **system.body("lora", names[number % len(names)]),
                    "messages": [{"role": "user", "content": f"{number}. {prompt}"}],
                    "max_tokens": load.n_tokens,
                    "temperature": 0.0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            )
            with lock:
                outcomes.append(outcome)

    threads = [threading.Thread(target=work) for _ in range(min(load.n_clients, n_requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    return outcomes
