"""Mixed chaos against a real server process for an hour: ``make soak``, or

    python -m tests.soak.run --minutes 60 --seed 1 --json soak.json

Exit status 0 if nothing that was acknowledged was lost, no adapter answered for another, memory and
open files stayed flat, and every failure was a 503 with Retry-After while the server was away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.server_process import ServerProcess, server_process

from .chaos import Chaos
from .marked import save_marked_base, write_contents
from .watch import Life

__all__ = ["soak"]

_N_CONTENTS = 40
_N_NAMES = 24


def soak(minutes: float, seed: int, *, restart_s: float, n_askers: int = 6) -> dict[str, object]:
    """Runs it and returns the report; ``restart_s``: seconds of a server's life, on the average."""
    with tempfile.TemporaryDirectory(prefix="loraplex-soak-") as folder:
        return asyncio.run(_soak(Path(folder), minutes, seed, restart_s, n_askers))


async def _soak(
    folder: Path, minutes: float, seed: int, restart_s: float, n_askers: int
) -> dict[str, object]:
    model = save_marked_base(folder / "marked")
    contents = write_contents(model, folder / "contents", _N_CONTENTS)
    chaos = Chaos(contents, [f"a{i}" for i in range(_N_NAMES)], seed)
    choices, lives = random.Random(seed), list[Life]()
    ends = float("inf")
    n_kills = n_stops = 0
    running: asyncio.Task[None] | None = None
    try:
        while True:
            with ExitStack() as stack:
                server = await asyncio.to_thread(_start, stack, folder)
                chaos.url = server.url
                if running is None:
                    await chaos.learn()
                    ends = time.monotonic() + 60 * minutes
                    running = asyncio.create_task(chaos.run(n_askers))
                await chaos.find_all()
                chaos.is_away = False
                lives.append(Life(server.process.pid))
                life_ends = time.monotonic() + restart_s * choices.uniform(0.5, 1.5)
                while time.monotonic() < min(ends, life_ends):
                    _check_alive(server, running)
                    lives[-1].sample()
                    _tell(chaos, lives, ends)
                    await asyncio.sleep(1)
                chaos.is_away, chaos.left_at = True, time.monotonic()
                if time.monotonic() >= ends:
                    break
                is_kill = choices.random() < 0.75
                n_kills, n_stops = n_kills + is_kill, n_stops + (not is_kill)
                server.signal(signal.SIGKILL if is_kill else signal.SIGTERM)
                await asyncio.to_thread(server.wait, 120)
    finally:
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    problems = [*chaos.violations, *(text for life in lives for text in life.problems())]
    return {
        "minutes": minutes,
        "seed": seed,
        "kills": n_kills,
        "stops": n_stops,
        "acknowledged": chaos.ledger.n_acknowledged,
        "counts": dict(sorted(chaos.counts.items())),
        "lives": [life.to_json() for life in lives],
        "problems": problems,
    }


def _start(stack: ExitStack, folder: Path) -> ServerProcess:
    return stack.enter_context(
        server_process(folder / "marked", folder / "state", "--max-loras", "12")
    )


def _check_alive(server: ServerProcess, running: asyncio.Task[None]) -> None:
    """Raises if the server died by itself, or a client of ours did."""
    if server.process.poll() is not None:
        raise RuntimeError(f"the server died by itself:\n{server.log[-3000:]}")
    if running.done():
        running.result()


def _tell(chaos: Chaos, lives: list[Life], ends: float) -> None:
    left = max(0, ends - time.monotonic())
    mib = lives[-1].samples[-1][1] if lives[-1].samples else 0
    line = (
        f"{left / 60:5.1f} min left  {chaos.counts['answers']:7d} answers  "
        f"{chaos.ledger.n_acknowledged:5d} changes  life {len(lives)}  {mib:5.0f} MiB  "
        f"{chaos.counts['violations']} violations"
    )
    print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def _table(report: dict[str, object]) -> str:
    counts, lives = report["counts"], report["lives"]
    assert isinstance(counts, dict)
    assert isinstance(lives, list)
    lines = [f"{key:14} {report[key]}" for key in ("kills", "stops", "acknowledged")]
    lines += [f"{key:14} {value}" for key, value in counts.items()]
    lines += ["", "life  seconds  MiB from  MiB to  MiB/min  files"]
    for number, life in enumerate(lives, start=1):
        slope = life["slope_mib_per_minute"]
        lines.append(
            f"{number:4}  {life['seconds']:7}  {life['rss_mib'][0]:8}  {life['rss_mib'][1]:6}  "
            f"{'-' if slope is None else slope:>7}  {life['open_files'][1]:5}"
        )
    problems = report["problems"]
    assert isinstance(problems, list)
    return "\n".join([*lines, "", *(problems or ["no problem found"])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed chaos against a real server process.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--restart-s", type=float, default=300.0, help="a server's life, on average"
    )
    parser.add_argument("--json", type=Path, help="where the report goes")
    arguments = parser.parse_args()
    report = soak(arguments.minutes, arguments.seed, restart_s=arguments.restart_s)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(_table(report))
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
