"""Mixed chaos against a real server process: ``make soak``, or

    python -m tests.soak.run --lives 10 --life-s 330 --seed 1 [--catalogue] --json soak.json

Clients that hold each answer to what it must be, attackers, a disk that is full or slow, with
``--catalogue`` an object store that goes away, and SIGKILL at the end of a life (SIGTERM
at the end of every fourth and of the last).

Exit status 0 if nothing that was acknowledged was lost, no adapter answered for another, memory and
open files stayed flat, the state directory held after each life, and every failure was a 503 with
Retry-After while the server, its disk or its catalogue was away.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.verification import verify
from tests.support.servers.object_stores import s3_environment, s3_server
from tests.support.servers.server_process import ServerProcess, server_process

from .attackers import Attackers
from .chaos import Chaos
from .machine_faults import Gate, MachineFaults, SmallDisk
from .marked import save_marked_base, write_contents
from .watch import Life

_N_CONTENTS = 40
_N_NAMES = 24
_N_ASKERS = 6


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to soak."""

    n_lives: int = 10
    life_s: float = 330.0
    last_life_s: float | None = None  # None: as long as the others
    seed: int = 1
    catalogue: bool = False

    def seconds(self, number: int) -> float:
        """Return the seconds of a life, numbered from 1."""
        is_last = number == self.n_lives and self.last_life_s is not None
        return (self.last_life_s or 0.0) if is_last else self.life_s


def soak(plan: Plan) -> dict[str, object]:
    """Run the lives and return the report."""
    with tempfile.TemporaryDirectory(prefix="loraplex-soak-") as folder:
        return asyncio.run(_soak(plan, Path(folder)))


async def _soak(plan: Plan, folder: Path) -> dict[str, object]:
    with ExitStack() as stack:
        return await _lives(plan, folder, stack)


async def _lives(plan: Plan, folder: Path, stack: ExitStack) -> dict[str, object]:
    model = save_marked_base(folder / "marked")
    contents = write_contents(model, folder / "contents", _N_CONTENTS)
    disk = SmallDisk(folder, stack)
    gate = Gate(stack.enter_context(s3_server())) if plan.catalogue else None
    if gate is not None:
        stack.callback((await gate.open()).close)
    chaos = Chaos(contents, [f"a{i}" for i in range(_N_NAMES)], plan.seed)
    attackers = Attackers(chaos, model)
    faults = MachineFaults(chaos, disk, gate)
    choices, lives = random.Random(plan.seed), list[Life]()
    clients: asyncio.Task[None] | None = None
    n_kills = 0
    try:
        for number in range(1, plan.n_lives + 1):
            with ExitStack() as life:
                server = await asyncio.to_thread(_start, life, folder, disk, gate)
                chaos.url = server.url
                if clients is None:
                    await chaos.learn()
                    clients = asyncio.create_task(chaos.run(_N_ASKERS, attackers.acts()))
                await chaos.find_all()
                lives.append(Life(server.process.pid))
                breaking = asyncio.create_task(faults.run(choices, server.process.pid))
                chaos.is_away = False
                await _live(plan.seconds(number), server, lives, chaos, (clients, breaking))
                chaos.is_away, chaos.left_at = True, time.monotonic()
                is_kill = number < plan.n_lives and number % 4 != 0
                n_kills += is_kill
                server.signal(signal.SIGKILL if is_kill else signal.SIGTERM)
                await asyncio.to_thread(server.wait, 120)
                await _cancel(breaking)
                if gate is None:
                    _check_directory(disk.folder / "state", chaos)
    finally:
        if clients is not None:
            await _cancel(clients)
        await attackers.close()
    problems = [*chaos.violations, *(text for life in lives for text in life.problems())]
    return {
        "seed": plan.seed,
        "catalogue": plan.catalogue,
        "kills": n_kills,
        "acknowledged": chaos.ledger.n_acknowledged,
        "longest_health_s": round(chaos.longest_look_s, 2),
        "counts": dict(sorted(chaos.counts.items())),
        "lives": [life.to_json() for life in lives],
        "problems": problems,
    }


def _start(stack: ExitStack, folder: Path, disk: SmallDisk, gate: Gate | None) -> ServerProcess:
    environment: Mapping[str, str] = disk.environment
    flags = ["--max-loras", "12", "--allow-training"]
    if gate is not None:
        environment = {**environment, **s3_environment(gate.url)}
        flags += ["--catalogue", "s3://adapters/soak"]
    state = disk.folder / "state"
    return stack.enter_context(
        server_process(folder / "marked", state, *flags, warm=False, environment=environment)
    )


async def _live(
    seconds: float,
    server: ServerProcess,
    lives: list[Life],
    chaos: Chaos,
    tasks: tuple[asyncio.Task[None], ...],
) -> None:
    """Watch a life. Raises if the server died by itself, or a client of ours did."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server died by itself:\n{server.log[-3000:]}")
        for task in tasks:
            if task.done():
                task.result()
        lives[-1].sample()
        _tell(chaos, lives, ends)
        await asyncio.sleep(1)


def _check_directory(state: Path, chaos: Chaos) -> None:
    """A kill may leave files behind, and no damage."""
    for problem in verify(state, StoreLimits()).problems:
        chaos.counts["left-overs"] += not problem.is_damage
        if problem.is_damage:
            chaos.violation(f"after a life: {problem.subject}: {problem.text}")


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _tell(chaos: Chaos, lives: list[Life], ends: float) -> None:
    left = max(0, ends - time.monotonic())
    mib = lives[-1].samples[-1][1] if lives[-1].samples else 0
    line = (
        f"{left:4.0f} s left  {chaos.counts['answers']:7d} answers  "
        f"{chaos.ledger.n_acknowledged:5d} changes  life {len(lives)}  {mib:5.0f} MiB  "
        f"{chaos.counts['violations']} violations"
    )
    print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def _table(report: dict[str, object]) -> str:
    counts, lives = report["counts"], report["lives"]
    assert isinstance(counts, dict)
    assert isinstance(lives, list)
    lines = [f"{key:18} {report[key]}" for key in ("kills", "acknowledged", "longest_health_s")]
    lines += [f"{key:18} {value}" for key, value in counts.items()]
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
    parser.add_argument("--lives", type=int, default=10)
    parser.add_argument("--life-s", type=float, default=330.0, help="seconds of each life")
    parser.add_argument("--last-life-s", type=float, help="seconds of the last one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--catalogue", action="store_true", help="names live in an object store")
    parser.add_argument("--json", type=Path, help="where the report goes")
    given = parser.parse_args()
    report = soak(Plan(given.lives, given.life_s, given.last_life_s, given.seed, given.catalogue))
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    print(_table(report))
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
