"""Adapters that are trained on chats of a client: one at a time, in a process beside serving.

order ──► job ──► `loraplex_training.child` in a folder of the store ──► put under the name
                    │ a line for each step: losses                        (or nothing changes)
                    └ killed when the job is cancelled or the server ends

`learning` is for a few pairs and a sentence, in this process; this is for hundreds of chats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.api.errors import ApiError, invalid, too_many
from loraplex_server.api_keys import AdapterAccess
from loraplex_training.child import ADAPTER, DATA, ORDER, Order
from loraplex_training.examples import Chat

from .jobs import Job, JobCancelled, Jobs

__all__ = ["Training", "TrainingOrder"]

_COMMAND = (sys.executable, "-m", "loraplex_training.child")
_DEFAULT_BUDGET_S = 300.0
_N_PROMPTS = 8  # of the data, for the card
_MAX_PROMPT = 500  # characters
_LOGGED = 2000  # characters of what a process that failed has written
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TrainingOrder:
    name: str  # as the store knows it
    chats: Sequence[Chat]
    description: str | None
    steps: int
    budget_s: float | None
    rank: int
    alpha: float | None
    lr: float
    seed: int
    replace: bool  # whether a name that exists gets a new revision


class Training:
    """Owner of the process that trains. Event loop only."""

    def __init__(
        self,
        store: AdapterStore,
        jobs: Jobs,
        executor: Executor,
        *,
        base: Path,
        base_name: str,
        n_threads: int,
        max_budget_s: float,
        max_rank: int | None = None,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """``executor`` runs what blocks for tens of milliseconds; ``command`` gets a folder."""
        self._store, self._jobs, self._executor = store, jobs, executor
        self._base, self._base_name = base, base_name
        self._n_threads, self._max_budget_s, self._max_rank = n_threads, max_budget_s, max_rank
        self._command = command
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-training-process")
        self._process: _Process | None = None  # of the job that runs

    def start(self, order: TrainingOrder, access: AdapterAccess) -> Job:
        """Raises ApiError (400, 429)."""
        budget_s = self._budget(order.budget_s)
        if self._max_rank is not None and order.rank > self._max_rank:
            told = f"rank is {order.rank}, this server serves at most {self._max_rank}"
            raise invalid(f"{told} (--max-lora-rank)", "rank")
        if self._process is not None:
            raise too_many(
                "another adapter is being trained, and one is at a time; wait for its job to end",
                "too_many_training_jobs",
                min(60.0, budget_s),
            )
        process = _Process(self._command)
        work = partial(self._work, order, access, budget_s, process)
        job = self._jobs.start_task(order.name, access, work, param="name")
        self._process = process
        job.cancel = process.stop
        job.training = {
            "step": 0,
            "n_steps": order.steps,
            "n_examples": len(order.chats),
            "loss": None,
            "validation_loss": None,
            "base_validation_loss": None,
            "tokens_per_s": None,
        }
        return job

    def close(self) -> None:
        """Training stops at once."""
        if self._process is not None:
            self._process.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _budget(self, wanted_s: float | None) -> float:
        if wanted_s is None:
            return min(_DEFAULT_BUDGET_S, self._max_budget_s)
        if wanted_s > self._max_budget_s:
            raise invalid(
                f"budget_s is {wanted_s:g}, this server trains for at most "
                f"{self._max_budget_s:g} seconds (--max-learning-time)",
                "budget_s",
            )
        return wanted_s

    async def _work(
        self,
        order: TrainingOrder,
        access: AdapterAccess,
        budget_s: float,
        process: _Process,
        job: Job,
    ) -> AdapterCard:
        leaving = ExitStack()
        try:
            upload = self._store.upload_folder()
            folder = await self._blocking(partial(leaving.enter_context, upload))
            await self._blocking(partial(self._write, folder, order, budget_s))
            job.tell("loading the base", 0.0)
            await self._trained(folder, job, process)
            job.tell("storing", 1.0)
            return await self._blocking(partial(self._put, folder / ADAPTER, order, access))
        finally:
            process.stop()  # if the loop ends
            self._process = None
            await self._blocking(leaving.close)

    async def _trained(self, folder: Path, job: Job, process: _Process) -> None:
        loop = asyncio.get_running_loop()

        def tell(line: dict[str, object]) -> None:
            loop.call_soon_threadsafe(_tell, job, line)

        run = partial(process.run, folder, tell)
        last = await loop.run_in_executor(self._thread, run)
        if process.is_stopped:
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

    def _write(self, folder: Path, order: TrainingOrder, budget_s: float) -> None:
        with (folder / DATA).open("w", encoding="utf-8") as data:
            data.writelines(json.dumps(chat.to_json()) + "\n" for chat in order.chats)
        told = Order(
            base=str(self._base),
            base_name=self._base_name,
            rank=order.rank,
            alpha=2.0 * order.rank if order.alpha is None else order.alpha,
            steps=order.steps,
            lr=order.lr,
            seed=order.seed,
            max_seconds=budget_s,
            n_threads=self._n_threads,
        )
        (folder / ORDER).write_text(json.dumps(asdict(told)))

    def _put(self, made: Path, order: TrainingOrder, access: AdapterAccess) -> AdapterCard:
        """Raises what the store raises: RevisionConflict if the name was taken meanwhile."""
        card = json.loads((made / "card.json").read_text())
        options = PutOptions(
            replace=order.replace,
            description=order.description,
            examples=_prompts(order.chats),
            provenance={"source": "trained", "training": card["training"]},
            quota=access.quota,
        )
        config = (made / "adapter_config.json").read_bytes()
        weights = made / "adapter_model.safetensors"
        return self._store.put_files(order.name, config, weights, options=options)

    async def _blocking(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class _Process:
    """``run`` blocks in a thread; ``stop`` may be called from any thread, before or after, too."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.is_stopped = False

    def run(self, folder: Path, tell: Callable[[dict[str, object]], None]) -> dict[str, object]:
        """The last line that the process told; others are for ``tell``. Empty: it told none."""
        command = [*self._command, str(folder)]
        last: dict[str, object] = {}
        with (folder / "log").open("w+b") as log:
            with self._lock:
                if self.is_stopped:
                    return last
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
                )
            with self._process as process:
                assert process.stdout is not None
                for line in process.stdout:
                    last = json.loads(line)
                    tell(last)
            if process.returncode != 0 and not self.is_stopped:
                log.seek(0)
                told = log.read().decode(errors="replace")[-_LOGGED:]
                _log.error("training ended with status %d: %s", process.returncode, told)
                return {}
        return last

    def stop(self) -> None:
        with self._lock:
            self.is_stopped = True
            if self._process is not None:
                self._process.kill()


def _tell(job: Job, line: dict[str, object]) -> None:
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
    """What users of some of the chats say first: the card shows them."""
    said = (
        message["content"]
        for chat in chats[:_N_PROMPTS]
        for message in chat.messages
        if message["role"] == "user"
    )
    return tuple(dict.fromkeys(text[:_MAX_PROMPT] for text in said))[:_N_PROMPTS]
