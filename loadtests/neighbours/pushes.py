"""Measures how weights that a trainer pushes in lengthen the gaps between other tenants' tokens.

    python -m loadtests.neighbours.pushes [--rounds 5] [--seconds 24] [--out FILE]

A server with two keys. Four streams of one tenant decode with a pinned adapter. In turns, nobody
else asks for anything, or the other tenant's trainer puts a new revision of its LoRA fifty times a
minute, as RL loops do: each call is answered once the adapter is warm, and two older revisions
stay. The result has the gaps of both and their ratio at p99 (wanted: at most 1.15 on a machine that
does nothing else).
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import httpx

from loadtests.admin import upload_adapter, warm_adapter
from loadtests.client import admin_client
from loadtests.provenance import stamped
from loadtests.random_adapters import write_adapters
from loadtests.scenario import AdapterSet
from loadtests.systems import Loraplex, Target, started
from loraplex_server.model.loading.pull import resolve_model

from .interference import TOKENS_OF_A_STREAM, Streams, compared, spread

RANK, N_CONTENTS = 16, 12  # contents that take turns, so that each push brings another one
PUSHES_A_MINUTE = 50
WANTED_RATIO = 1.15
_RETAIN = {"retain": 2, "warm": True}
_READER, _TRAINER = "reader", "trainer"  # keys, and their tenants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each kind.")
    parser.add_argument("--seconds", type=float, default=24.0, help="Length of a turn.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        work, model = Path(folder), resolve_model()
        adapters = AdapterSet(lora=1 + N_CONTENTS, ranks=(RANK,))
        written = list(write_adapters(model, adapters, work / "adapters", seed=1))
        keys = write_keys(work / "keys.toml")
        system = Loraplex({"max-model-len": 1024, "keys": keys})
        with started(system, model, [], work) as target:
            result = measure(target, written, n_rounds=options.rounds, turn_s=options.seconds)
    result = stamped(result)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def write_keys(path: Path) -> Path:
    """Write the file of the two keys, each of a tenant of its own, and return its path."""
    path.write_text(
        "".join(
            f'[[key]]\nname = "{name}"\ntenant = "{name}"\nscope = "admin"\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            for name in (_READER, _TRAINER)
        )
    )
    path.chmod(0o600)
    return path


def measure(
    target: Target,
    folders: Sequence[Path],
    *,
    n_rounds: int,
    turn_s: float,
    max_tokens: int = TOKENS_OF_A_STREAM,
) -> dict[str, object]:
    """Measure gaps. Streams use the first adapter, and the contents of the others are pushed."""
    resident, contents = folders[0], folders[1:]
    with admin_client(target.url, _READER) as reader:
        upload_adapter(reader, resident.name, resident)
        warm_adapter(reader, resident.name)
        reader.post(f"/v1/adapters/{resident.name}/pin").raise_for_status()
    trainer = admin_client(target.url, _TRAINER)
    numbers = count()
    _push(trainer, contents[next(numbers) % len(contents)])  # the first one opens files
    streams = Streams(target.url, resident.name, max_tokens, _READER)
    quiet: list[tuple[float, float]] = []
    pushing: list[tuple[float, float]] = []
    calls: list[float] = []  # seconds
    for _ in range(n_rounds):
        began = time.perf_counter()
        time.sleep(turn_s)
        quiet.append((began, time.perf_counter()))
        began = time.perf_counter()
        for number in range(max(1, round(turn_s * PUSHES_A_MINUTE / 60))):
            due = began + number * 60 / PUSHES_A_MINUTE
            time.sleep(max(0.0, due - time.perf_counter()))
            calls.append(_push(trainer, contents[next(numbers) % len(contents)]))
        time.sleep(max(0.0, began + turn_s - time.perf_counter()))
        pushing.append((began, time.perf_counter()))
    streams.stop()
    trainer.close()
    alone, beside, ratio = compared(streams.gaps(), quiet, pushing)
    pushed_s = sum(end - start for start, end in pushing)
    return {
        "rank": RANK,
        "pushes": len(calls),
        "pushes_a_minute": round(60 * len(calls) / pushed_s, 1),
        "push_ms": spread(calls),
        "gap_ms_alone": alone,
        "gap_ms_beside_pushes": beside,
        "p99_ratio": ratio,
        "wanted_ratio": WANTED_RATIO,
    }


def _push(trainer: httpx.Client, folder: Path) -> float:
    """Put the content as the trainer's adapter and return the seconds until it was warm."""
    began = time.perf_counter()
    upload_adapter(trainer, "policy", folder, replace=True, params=_RETAIN)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
