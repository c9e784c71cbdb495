"""Runs all phases of a scenario against one server."""

# Importing locust patches the standard library, which must come before what uses sockets.
from .users import PhaseLoad, run_phase  # isort: skip

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .admin import Churn, warm_adapter
from .client import StreamingClient, admin_client
from .recorder import PhaseRecord
from .scenario import Phase, Scenario
from .server_metrics import MetricsSample, MetricsSampler, summarize
from .systems import Target
from .tiers import probe_tiers
from .traffic import Body, LoadRequest, Traffic

_SAMPLE_EVERY_S = 1.0
OnProgress = Callable[[str, float], None]  # what is going on, seconds of the scenario done


@dataclass(frozen=True, slots=True)
class RunResult:
    phases: list[dict[str, Any]]
    samples: list[MetricsSample]
    notes: list[str]  # what was left out, and why


class ScenarioRun:
    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        body: Body,
        model: Path,
        work: Path,
        on_progress: OnProgress,
    ) -> None:
        """``model`` and ``work`` are for the adapters that churn uploads."""
        self._scenario = scenario
        self._body = body
        self._model = model
        self._work = work
        self._on_progress = on_progress
        self._client = StreamingClient(target.url, target.api_key)
        self._admin = admin_client(target.url, target.api_key)
        self._sampler = MetricsSampler(self._admin, target.pid)
        self._names: dict[str, Sequence[str]] = {**scenario.adapters.names()}
        self._used: set[str] = set()
        self._sampled_at = 0.0

    def run(self, phases: Sequence[Phase]) -> RunResult:
        notes: list[str] = []
        rows, done = [], 0.0
        for phase in self._without_generation(phases, notes):
            self._on_progress(phase.label, done)
            if phase.kind == "tiers":
                rows.append(self._probe(phase))
            else:
                rows.append(self._load(phase, done))
            done += phase.seconds + phase.warmup_s
        if self._sampler.failure:
            notes.append(f"nothing is known from the server's side: {self._sampler.failure}")
        self._client.close()
        self._admin.close()
        return RunResult(rows, self._sampler.samples, notes)

    def _without_generation(self, phases: Sequence[Phase], notes: list[str]) -> list[Phase]:
        """Return the phases, without ``generated`` in their mix if the server cannot generate."""
        if not any(phase.mix.get("generated") for phase in phases):
            return list(phases)
        body = self._body("generated", "Write the date in German as JSON")
        messages = [{"role": "user", "content": "hello"}]
        outcome = self._client.stream(
            {**body, "messages": messages, "max_tokens": 1, "stream": True}
        )
        if outcome.error is None:
            return list(phases)
        notes.append(
            f"this server does not generate adapters, so none are asked for: {outcome.error}"
        )
        kept = []
        for phase in phases:
            mix = {family: share for family, share in phase.mix.items() if family != "generated"}
            if any(mix.values()):
                kept.append(replace(phase, mix=mix))
        return kept

    def _load(self, phase: Phase, done: float) -> dict[str, Any]:
        names = dict(self._names)
        record = PhaseRecord(phase, self._used)
        if phase.warm:
            for name in names["lora"][: phase.adapters or None]:
                warm_adapter(self._admin, name)
        self._sampler.sample(phase.label)
        with self._churning(phase) as churn:
            if churn is not None:
                names["churned"], record.removed = churn.names, churn.removed
            seed = self._scenario.seed
            traffic = Traffic(phase, self._scenario.request, names, self._body, seed)
            load = PhaseLoad(phase, traffic, self._client)

            def on_tick(now: float) -> None:
                self._on_progress(phase.label, done + phase.warmup_s + min(now, phase.seconds))
                if time.perf_counter() - self._sampled_at >= _SAMPLE_EVERY_S:
                    self._sampled_at = time.perf_counter()
                    self._sampler.sample(phase.label)

            run_phase(self._scenario, load, record.on_request, on_tick)
        self._sampler.sample(phase.label)
        record.n_unsent = load.n_unsent
        row = record.summary(self._scenario.slo) | summarize(self._sampler.of_phase(phase.label))
        row["open"] = phase.rate is not None
        if churn is not None:
            row["churn"] = {**churn.counts, "first_failure": churn.first_failure}
        return row

    @contextmanager
    def _churning(self, phase: Phase) -> Iterator[Churn | None]:
        """Upload and remove adapters in a greenlet until the phase is over."""
        if not phase.churn_per_s:
            yield None
            return
        from .random_adapters import write_lora  # torch takes seconds to import

        variants = [self._work / f"variant-{number}" for number in range(2)]
        for number, folder in enumerate(variants):
            write_lora(self._model, folder, rank=4, seed=1000 + number)
        churn = Churn(self._admin, variants, phase.churn_per_s)
        stop_at = time.perf_counter() + phase.seconds + phase.warmup_s
        thread = threading.Thread(target=churn.run, args=(stop_at,), daemon=True)
        thread.start()
        yield churn
        thread.join(60)

    def _probe(self, phase: Phase) -> dict[str, Any]:
        seed = self._scenario.seed
        traffic = Traffic(phase, self._scenario.request, self._names, self._body, seed)

        def request_for(name: str) -> LoadRequest:
            request = traffic.next(0.0)
            request.body.update(self._body("lora", name), max_tokens=2)
            return request

        names = self._names["lora"]
        tiers = probe_tiers(self._client, self._admin, names, request_for, n=phase.probes)
        return {"label": phase.label, "kind": "tiers", "sweep": "", "x": 0.0, "tiers": tiers}
