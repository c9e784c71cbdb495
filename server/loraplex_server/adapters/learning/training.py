"""Trains adapters on clients' chats, one at a time and fairly for all tenants, in a process.

request ──► job ──► `loraplex_training.child` in a folder of the store ──► stored under the name
                      │ prints the losses of each step
                      └ killed when the job is cancelled or the server ends

``learning`` handles a few examples with a description. This module handles hundreds of chats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.errors import ApiError, invalid, too_many
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantThreads
from loraplex_training.child import ADAPTER, DATA, ORDER, Order
from loraplex_training.config import PLAIN, RECIPES
from loraplex_training.examples import Chat

from .jobs import Job, JobCancelled, Jobs

_COMMAND = (sys.executable, "-m", "loraplex_training.child")
_DEFAULT_BUDGET_S = 300.0
_MAX_JOBS = 4  # of a tenant, running or waiting
_N_PROMPTS = 8  # prompts of the data on the card
_MAX_PROMPT = 500  # characters
_LOGGED = 2000  # characters of the output of a failed process
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    name: str  # stored name
    chats: Sequence[Chat]
    description: str | None
    steps: int
    budget_s: float | None
    recipe: str
    rank: int
    alpha: float | None
    lr: float
    seed: int
    replace: bool  # an existing name gets a new revision


class Training:
    """Owner of the process that trains, and of the jobs that wait for it. Event loop only."""

    def __init__(
        self,
        store: AdapterStore,
        jobs: Jobs,
        changes: TenantThreads,
        *,
        base: Path,
        base_name: str,
        n_threads: int,
        max_budget_s: float,
        max_rank: int,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """``changes`` run calls that block for tens of milliseconds."""
        self._store, self._jobs, self._changes = store, jobs, changes
        self._base, self._base_name = base, base_name
        self._n_threads, self._max_budget_s, self._max_rank = n_threads, max_budget_s, max_rank
        self._command = command
        self._threads = TenantThreads("training", 1, 1)
        self._processes: dict[_Process, str | None] = {}  # of running and waiting jobs, by tenant

    def start(self, request: TrainingRequest, access: AdapterAccess) -> Job:
        """Start a training job. Raises ApiError (400, 429)."""
        budget_s = self._budget(request.budget_s)
        if request.recipe not in (PLAIN, *RECIPES):
            raise invalid(
                f"recipe {request.recipe!r} is not known; choose {PLAIN}, "
                f"{', '.join(sorted(RECIPES))}",
                "recipe",
            )
        rank = request.rank * RECIPES.get(request.recipe, 1)
        if rank > self._max_rank:
            raise invalid(
                f"rank is {request.rank}, saved as {rank} by recipe {request.recipe!r}; this "
                f"server serves at most {self._max_rank} (--max-lora-rank)",
                "rank",
            )
        n_ours = list(self._processes.values()).count(access.tenant)
        if n_ours >= _MAX_JOBS:
            raise too_many(
                f"{n_ours} jobs of this tenant are trained or wait for it; wait for one to end",
                "too_many_training_jobs",
                min(60.0, budget_s),
            )
        process = _Process(self._command)
        work = partial(self._work, request, access, budget_s, process)
        job = self._jobs.start_task(request.name, access, work, param="name")
        self._processes[process] = access.tenant
        job.cancel = process.stop
        job.training = {
            "step": 0,
            "n_steps": request.steps,
            "n_examples": len(request.chats),
            "loss": None,
            "validation_loss": None,
            "base_validation_loss": None,
            "tokens_per_s": None,
        }
        return job

    def close(self) -> None:
        """Stop training at once."""
        for process in list(self._processes):
            process.stop()
        self._threads.close(wait=True)

    def _budget(self, budget_s: float | None) -> float:
        """Return the seconds of the job. Raises ApiError (400)."""
        if budget_s is None:
            return min(_DEFAULT_BUDGET_S, self._max_budget_s)
        if budget_s > self._max_budget_s:
            raise invalid(
                f"budget_s is {budget_s:g}, this server trains for at most "
                f"{self._max_budget_s:g} seconds (--max-learning-time)",
                "budget_s",
            )
        return budget_s

    async def _work(
        self,
        request: TrainingRequest,
        access: AdapterAccess,
        budget_s: float,
        process: _Process,
        job: Job,
    ) -> AdapterCard:
        blocking = partial(self._changes.run, access.tenant)
        closing = ExitStack()
        try:
            upload = self._store.upload_folder()
            folder = await blocking(partial(closing.enter_context, upload))
            await blocking(partial(self._write, folder, request, budget_s))
            await self._train(folder, job, process)
            job.tell("storing", 1.0)
            return await blocking(partial(self._put, folder / ADAPTER, request, access))
        finally:
            process.stop()  # in case the event loop ends
            del self._processes[process]
            await blocking(closing.close)

    async def _train(self, folder: Path, job: Job, process: _Process) -> None:
        """Raises JobCancelled: at once if the process has not started, else once it is killed."""
        if process.stopped.is_set():
            raise JobCancelled
        loop = asyncio.get_running_loop()

        def report(line: dict[str, object]) -> None:
            loop.call_soon_threadsafe(_show_progress, job, line)

        def run() -> dict[str, object]:
            loop.call_soon_threadsafe(job.tell, "loading the base", 0.0)
            return process.run(folder, report)

        starting = asyncio.ensure_future(self._threads.start(job.access.tenant, run))

        def cancel() -> None:
            process.stop()
            starting.cancel()  # does nothing once the process has started

        job.cancel = cancel
        try:
            last = await (await starting)
        except asyncio.CancelledError:
            if process.stopped.is_set() and starting.cancelled():
                raise JobCancelled from None
            raise
        if process.stopped.is_set():
            raise JobCancelled
        if "error" in last:
            param = last["param"]
            raise ApiError(
                400,
                str(last["error"]),
                code="training_failed",
                param=None if param is None else str(param),
            )
        if "done" not in last:
            raise ApiError(
                500, "training failed; the server's log says why", code="training_failed"
            )

    def _write(self, folder: Path, request: TrainingRequest, budget_s: float) -> None:
        with (folder / DATA).open("w", encoding="utf-8") as data:
            data.writelines(json.dumps(chat.to_json()) + "\n" for chat in request.chats)
        order = Order(
            base=str(self._base),
            base_name=self._base_name,
            recipe=request.recipe,
            rank=request.rank,
            alpha=2.0 * request.rank if request.alpha is None else request.alpha,
            steps=request.steps,
            lr=request.lr,
            seed=request.seed,
            max_seconds=budget_s,
            n_threads=self._n_threads,
        )
        (folder / ORDER).write_text(json.dumps(asdict(order)))

    def _put(self, adapter: Path, request: TrainingRequest, access: AdapterAccess) -> AdapterCard:
        """Store the adapter. Raises StoreError, such as RevisionConflict for a taken name."""
        card = json.loads((adapter / "card.json").read_text())
        options = PutOptions(
            replace=request.replace,
            description=request.description,
            examples=_prompts(request.chats),
            provenance={"source": "trained", "training": card["training"]},
            quota=access.quota,
        )
        config = (adapter / "adapter_config.json").read_bytes()
        weights = adapter / "adapter_model.safetensors"
        return self._store.put_files(request.name, config, weights, options=options)


class _Process:
    """A training process. ``run`` blocks; ``stop`` may be called at any time, from any thread."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = threading.Event()

    def run(self, folder: Path, report: Callable[[dict[str, object]], None]) -> dict[str, object]:
        """Run the process and pass its lines to ``report``. Return the last line, or nothing."""
        command = [*self._command, str(folder)]
        last: dict[str, object] = {}
        with (folder / "log").open("w+b") as log:
            with self._lock:
                if self.stopped.is_set():
                    return last
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
                )
            with self._process as process:
                assert process.stdout is not None
                for line in process.stdout:
                    last = json.loads(line)
                    report(last)
            if process.returncode != 0 and not self.stopped.is_set():
                log.seek(0)
                output = log.read().decode(errors="replace")[-_LOGGED:]
                _log.error("training ended with status %d: %s", process.returncode, output)
                return {}
        return last

    def stop(self) -> None:
        with self._lock:
            self.stopped.set()
            if self._process is not None:
                self._process.kill()


def _show_progress(job: Job, line: dict[str, object]) -> None:
    if job.training is None or "step" not in line:
        return
    job.training = {**job.training, **{key: _rounded(value) for key, value in line.items()}}
    step, n_steps = line["step"], line["n_steps"]
    assert isinstance(step, int)
    assert isinstance(n_steps, int)
    job.tell("training", step / n_steps)


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def _prompts(chats: Sequence[Chat]) -> tuple[str, ...]:
    """Return prompts of users for the card."""
    prompts = (
        message["content"]
        for chat in chats[:_N_PROMPTS]
        for message in chat.messages
        if message["role"] == "user"
    )
    return tuple(dict.fromkeys(text[:_MAX_PROMPT] for text in prompts))[:_N_PROMPTS]
