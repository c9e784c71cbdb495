"""Measures the gain of a second engine replica on one machine under the same load.

    python -m loadtests.replicas [--users 16] [--adapters 8] [--seconds 60] [--out FILE]

Users send one streamed chat after another, each to an adapter drawn evenly. In turn they meet
`loraplex serve`, a cluster with one replica and a cluster with two. The cores are shared out: with
two replicas each computes with half of the threads. Needs `loraplex[ray]`.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from loraplex_server.model.loading.pull import resolve_model

from .admin import warm_adapter
from .client import Outcome, StreamingClient, admin_client
from .provenance import commit, machine
from .random_adapters import write_adapters
from .recorder import percentile
from .scenario import AdapterSet
from .systems import BASE, Loraplex, System, started

RANK = 16
PROMPT_WORDS, ANSWER_TOKENS = 60, 48
_WARM_UP_S = 5.0
_WORDS = ("harbour", "letter", "window", "river", "copper", "evening", "garden", "ladder")


class LoraplexCluster(System):
    """`loraplex cluster up` with a number of engine replicas."""

    def __init__(self, n_replicas: int, threads: int) -> None:
        super().__init__()
        self.name = f"cluster-{n_replicas}"
        self._n_replicas = n_replicas
        self._threads = threads

    def missing(self) -> str | None:
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        server: dict[str, object] = {
            "model": str(model),
            "served-model-name": BASE,
            "state-dir": str(work / f"state-{port}"),
            "log-level": "warning",
            "demos": False,
            "threads": self._threads,
            "max-model-len": 1024,
            "port": port,
            "lora-modules": [f"{path.name}={path}" for path in adapters],
        }
        if dtype is not None:
            server["dtype"] = dtype
        file = work / f"{self.name}.yaml"
        file.write_text(json.dumps({"server": server, "engines": {"replicas": self._n_replicas}}))
        command, extra = Loraplex().command(model, adapters, port, dtype, work)
        return [*command[:3], "cluster", "up", str(file)], extra

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        return Loraplex().body(family, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="Seconds to measure each system."
    )
    parser.add_argument("--model", help="Directory or name of the base; default: the default base.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    systems: dict[str, System] = {
        "one process": Loraplex({"max-model-len": 1024, "threads": cores}),
        "cluster, one replica": LoraplexCluster(1, cores),
        "cluster, two replicas": LoraplexCluster(2, max(1, cores // 2)),
    }
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        model = resolve_model(options.model)
        adapters = AdapterSet(lora=options.adapters, ranks=(RANK,))
        written = list(write_adapters(model, adapters, Path(folder) / "adapters", seed=1))
        names = [path.name for path in written]
        for number, (title, system) in enumerate(systems.items()):
            work = Path(folder) / str(number)
            work.mkdir()
            with started(system, model, written, work) as target:
                found[title] = measure(target.url, names, options.users, options.seconds)
            print(title, json.dumps(found[title]), flush=True)
    result = {
        "began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "commit": commit(),
        "load_average": os.getloadavg()[0],  # at the end: above the users' own, others worked too
        "users": options.users,
        "adapters": options.adapters,
        "rank": RANK,
        "measured": found,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(url: str, names: Sequence[str], n_users: int, seconds: float) -> dict[str, object]:
    """Count the requests sent in the window, and wait for those still running at its end."""
    with admin_client(url) as admin:
        for name in names:
            warm_adapter(admin, name)
    client = StreamingClient(url)
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    counts_from = began + _WARM_UP_S
    ends = counts_from + seconds

    def user(number: int) -> None:
        drawn = random.Random(number)
        while time.perf_counter() < ends:
            prompt = " ".join(drawn.choices(_WORDS, k=PROMPT_WORDS))
            body = {
                "model": BASE,
                "adapter": drawn.choice(names),
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            outcomes.append(client.stream(body))

    threads = [threading.Thread(target=user, args=(number,)) for number in range(n_users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    counted = [outcome for outcome in outcomes if outcome.sent_at >= counts_from]
    served = [outcome for outcome in counted if outcome.error is None and outcome.status == 200]
    last_end = max(outcome.sent_at + outcome.e2e_s for outcome in counted)
    ttft_ms = [1000 * outcome.ttft_s for outcome in served if outcome.ttft_s is not None]
    return {
        "requests": len(counted),
        "lost": len(counted) - len(served),
        "tokens_per_s": round(sum(o.n_tokens for o in served) / (last_end - counts_from), 1),
        "ttft_ms": {f"p{percent}": percentile(ttft_ms, percent) for percent in (50, 99)},
        "tpot_ms": round(1000 * mean(outcome.tpot_s for outcome in served), 2),
    }


if __name__ == "__main__":
    main()
