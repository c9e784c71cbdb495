"""Measures how learning from examples lengthens the gaps between other requests' tokens.

    python -m loadtests.neighbours.learning [--share 0.1] [--n-jobs 6] [--budget 20] [--out FILE]

Four streams decode with a pinned adapter. In turns, nobody else asks for anything, or a job learns
from eight pairs. The result has the gaps of both, their ratio at p99 (wanted: at most 1.15 on a
machine that does nothing else), how many of the machine's cores the job may use, and how much
memory the server's process took while it learnt.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from loadtests.admin import warm_adapter
from loadtests.client import admin_client
from loadtests.provenance import stamped
from loadtests.random_adapters import write_adapters
from loadtests.scenario import AdapterSet
from loadtests.systems import Loraplex, started
from loraplex_server.model.loading.pull import resolve_model

from .interference import TOKENS_OF_A_STREAM, Streams, compared

RANK = 16
CORES_TO_LEARN_ON = 1  # of --learning-threads
WANTED_RATIO = 1.15
_FIRST_NAMES = ("Marta", "Jonas", "Alice", "Peter", "Hanna", "Luis")
_SURNAMES = (
    *("Keller", "Brandt", "Moreau", "Novak", "Vogel", "Silva", "Larsen", "Costa", "Weber"),
    *("Dubois", "Rossi", "Hansen", "Murphy", "Kovacs", "Lindgren", "Marino"),
)
_LOOK_S = 0.5  # between two looks at the job and the server's memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, help="--learning-share; default: the server's")
    parser.add_argument("--n-jobs", type=int, default=6)
    parser.add_argument("--budget", type=float, default=20.0, help="Seconds that a job learns.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        work, model = Path(folder), resolve_model()
        adapters = AdapterSet(lora=1, ranks=(RANK,))
        written = list(write_adapters(model, adapters, work / "adapters", seed=1))
        server = {"max-model-len": 1024, "learning-threads": CORES_TO_LEARN_ON}
        if options.share is not None:
            server["learning-share"] = options.share
        system = Loraplex(server)
        with started(system, model, written, work) as target:
            assert target.pid is not None
            result = measure(
                target.url,
                target.pid,
                written[0].name,
                n_jobs=options.n_jobs,
                budget_s=options.budget,
            )
    told = stamped({"share": options.share, **result})
    print(json.dumps(told, indent=1))
    if options.out:
        options.out.write_text(json.dumps(told, indent=1) + "\n")


def measure(
    url: str,
    pid: int,
    resident: str,
    *,
    n_jobs: int,
    budget_s: float,
    max_tokens: int = TOKENS_OF_A_STREAM,
) -> dict[str, object]:
    admin = admin_client(url)
    warm_adapter(admin, resident)
    admin.post(f"/v1/adapters/{resident}/pin").raise_for_status()
    learn(admin, pid, number=-1, budget_s=budget_s)  # loads the generator and its encoder
    streams = Streams(url, resident, max_tokens)
    quiet: list[tuple[float, float]] = []
    learning: list[tuple[float, float]] = []
    jobs: list[Job] = []
    for number in range(n_jobs):
        began = time.perf_counter()
        time.sleep(budget_s)
        quiet.append((began, time.perf_counter()))
        began = time.perf_counter()
        jobs.append(learn(admin, pid, number=number, budget_s=budget_s))
        learning.append((began, time.perf_counter()))
    streams.stop()
    admin.close()
    alone, beside, ratio = compared(streams.gaps(), quiet, learning)
    return {
        "jobs": n_jobs,
        "budget_s": budget_s,
        "learns_on_cores": CORES_TO_LEARN_ON,
        "of_cores": psutil.cpu_count(),
        "gap_ms_alone": alone,
        "gap_ms_beside_learning": beside,
        "p99_ratio": ratio,
        "wanted_ratio": WANTED_RATIO,
        "steps": [job.steps for job in jobs],
        "rss_mib_before": [job.rss_before >> 20 for job in jobs],
        "rss_mib_peak": [job.rss_peak >> 20 for job in jobs],
    }


class Job(NamedTuple):
    steps: int  # 0: nothing was trained
    rss_before: int  # bytes of the server's process
    rss_peak: int  # while it learnt


def learn(admin: httpx.Client, pid: int, *, number: int, budget_s: float) -> Job:
    """Run one job to its end."""
    process = psutil.Process(pid)
    drawn = random.Random(number)  # other pairs for each job: equal orders would share one
    order = {
        "description": "Give the surname of the person",
        "examples": [  # written as nobody has trained it, so that there is something to learn
            {"prompt": f"{drawn.choice(_FIRST_NAMES)} {surname}", "answer": f"Dear {surname} & Co"}
            for surname in drawn.sample(_SURNAMES, 8)
        ],
        "force": True,
        "budget_s": budget_s,
        "name": f"learning{number}" if number >= 0 else "warm-up",
    }
    before = peak = process.memory_info().rss
    job = admin.post("/v1/adapters/generate", json=order).raise_for_status().json()
    while job["status"] == "running":
        time.sleep(_LOOK_S)
        peak = max(peak, process.memory_info().rss)
        job = admin.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
    if job["status"] != "succeeded" and job["error"]["code"] != "out_of_time":
        raise RuntimeError(f"the job failed: {job['error']}")
    return Job(job["learning"]["step"], before, peak)


if __name__ == "__main__":
    main()
