"""Measures how adapter loads lengthen the gaps between other requests' tokens.

    python -m loadtests.neighbours.interference [--n-loads 120] [--from host|disk] [--out FILE]

A server with 8 device slots; four streams decode with a pinned adapter. In turns of one second,
another client does nothing, or brings adapters to the device one after the other (`warm`), each
evicting another. Gaps are counted by what happened while they lasted. `--from host` loads adapters
that wait in host memory; `--from disk` gives the host tier room for two, so each load reads a file.
"""

import argparse
import json
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests.admin import warm_adapter
from loadtests.client import Outcome, StreamingClient, admin_client
from loadtests.provenance import stamped
from loadtests.random_adapters import write_adapters
from loadtests.recorder import percentile
from loadtests.scenario import AdapterSet
from loadtests.systems import Loraplex, started
from loraplex_server.model.loading.pull import resolve_model

N_STREAMS, N_SLOTS, N_ADAPTERS, RANK = 4, 8, 24, 16
TURN_S = 1.0
LOADS_PER_TURN = 5
TOKENS_OF_A_STREAM = 900
ADAPTER_BYTES = 10 << 20  # rank 16 on all linears of the default base, in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n-loads", type=int, default=120)
    parser.add_argument("--from", dest="tier", choices=["host", "disk"], default="host")
    parser.add_argument("--out", type=Path, help="JSON file to which the result is added, by tier.")
    options = parser.parse_args()
    host_bytes = (2 if options.tier == "disk" else 2 * N_ADAPTERS) * 2 * ADAPTER_BYTES
    settings = {"max-loras": N_SLOTS, "adapter-host-memory": host_bytes, "max-model-len": 1024}
    adapters = AdapterSet(lora=N_ADAPTERS, ranks=(RANK,))
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        work, model = Path(folder), resolve_model()
        written = list(write_adapters(model, adapters, work / "adapters", seed=1))
        with started(Loraplex(settings), model, written, work) as target:
            result = measure(target.url, [path.name for path in written], options.n_loads)
    result = stamped(result)
    print(json.dumps(result, indent=1))
    if options.out:
        found = json.loads(options.out.read_text()) if options.out.is_file() else {}
        found[options.tier] = result
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    url: str, names: Sequence[str], n_loads: int, *, max_tokens: int = TOKENS_OF_A_STREAM
) -> dict[str, object]:
    """Measure gaps. Streams use the first adapter; the others are loaded one after the other."""
    resident, cold = names[0], names[1:]
    admin = admin_client(url)
    warm_adapter(admin, resident)
    admin.post(f"/v1/adapters/{resident}/pin").raise_for_status()
    before = device_loads(admin)
    streams = Streams(url, resident, max_tokens)
    loads: list[tuple[float, float]] = []  # from, to
    quiet: list[tuple[float, float]] = []
    while len(loads) < n_loads:
        began = time.perf_counter()
        time.sleep(TURN_S)  # a turn without loads
        quiet.append((began, time.perf_counter()))
        for _ in range(LOADS_PER_TURN):
            began = time.perf_counter()
            warm_adapter(admin, cold[len(loads) % len(cold)])
            now = time.perf_counter()
            loads.append((began, now))
            time.sleep(max(0.0, TURN_S / LOADS_PER_TURN - (now - began)))
    streams.stop()
    after = device_loads(admin)
    admin.close()
    gaps = streams.gaps()
    # The engine places the adapter in the step after the answer: two more steps belong to a load.
    step = median(length for _, length in gaps)
    beside = Intervals([(start, end + 2 * step) for start, end in loads])
    calm = Intervals(quiet)
    in_load_turns = Intervals([(a[1], b[0]) for a, b in pairwise(quiet)])
    undisturbed = [g for at, g in gaps if calm.meets(at, at) and calm.meets(at + g, at + g)]
    return {
        "streams": N_STREAMS,
        "rank": RANK,
        "loads": after[0] - before[0],
        "loads_a_second": LOADS_PER_TURN / TURN_S,
        "place_to_resident_ms": round(1000 * (after[1] - before[1]) / (after[0] - before[0]), 2),
        "warm_call_ms": spread([end - start for start, end in loads]),
        "gap_ms_without_loads": spread(undisturbed),
        "gap_ms_in_seconds_with_loads": spread(
            [g for at, g in gaps if in_load_turns.meets(at, at)]
        ),
        "gap_ms_during_a_load": spread([g for at, g in gaps if beside.meets(at, at + g)]),
        "n_gaps": len(gaps),
    }


class Streams:
    """Clients that decode without a pause until ``stop``."""

    def __init__(self, url: str, adapter: str, max_tokens: int, api_key: str | None = None) -> None:
        self._body = {
            "model": adapter,
            "stream": True,
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        self._client = StreamingClient(url, api_key)
        self._stopping = threading.Event()
        self._outcomes: list[Outcome] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(N_STREAMS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the clients and wait for their answers."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def gaps(self) -> list[tuple[float, float]]:
        """Return (start, seconds) of each gap without a prefill of a stream."""
        found = []
        prompts = Intervals([(o.sent_at, o.sent_at + (o.ttft_s or 0.0)) for o in self._outcomes])
        for outcome in self._outcomes:
            at = outcome.sent_at + (outcome.ttft_s or 0.0)
            for gap in outcome.gaps_s:
                if not prompts.meets(at, at + gap):
                    found.append((at, gap))
                at += gap
        return found

    def _run(self, number: int) -> None:
        while not self._stopping.is_set():
            messages = [{"role": "user", "content": f"Client {number}, go on counting."}]
            outcome = self._client.stream({**self._body, "messages": messages})
            if outcome.error:
                raise RuntimeError(outcome.error)
            self._outcomes.append(outcome)


class Intervals:
    """Spans of time, which may overlap."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        merged: list[tuple[float, float]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._starts = [start for start, _ in merged]
        self._ends = [end for _, end in merged]

    def meets(self, start: float, end: float) -> bool:
        index = bisect_left(self._ends, start)
        return index < len(self._starts) and self._starts[index] <= end


def device_loads(admin: httpx.Client) -> tuple[int, float]:
    """Return the number of device loads so far and the sum of their seconds."""
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(admin.get("/metrics").text)
        for sample in family.samples
    }
    name = "loraplex_adapter_device_load_seconds"
    return int(values[f"{name}_count"]), values[f"{name}_sum"]


def compared(
    gaps: Sequence[tuple[float, float]],
    quiet: Sequence[tuple[float, float]],
    disturbed: Sequence[tuple[float, float]],
) -> tuple[dict[str, float | None], dict[str, float | None], float]:
    """Return the spread of the gaps that begin in quiet and in disturbed spans, and p99's ratio."""
    alone, beside = (
        spread([gap for at, gap in gaps if Intervals(spans).meets(at, at)])
        for spans in (quiet, disturbed)
    )
    assert alone["p99"] is not None
    assert beside["p99"] is not None
    return alone, beside, round(beside["p99"] / alone["p99"], 3)


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    milliseconds = [1000 * value for value in seconds]
    return {
        **{f"p{percent}": percentile(milliseconds, percent) for percent in (50, 99, 100)},
        "n": len(seconds),
    }


if __name__ == "__main__":
    main()
