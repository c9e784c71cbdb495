"""Trains adapters on clients' chats, one at a time for each tenant.

request ──► job ──► waits for a turn ──► steps on the thread that trains ──► stored under the name
                     └ cancelled between steps; ended by its steps or by its time

``learning`` handles a few examples with a description. This module handles hundreds of chats.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import torch
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.learning.jobs import Job, JobCancelled, Jobs, take_turn
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.errors import invalid, too_many
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantShares, TenantThreads
from loraplex_training.checkpoint import Progress
from loraplex_training.config import AdapterShape
from loraplex_training.engine.engine import BATCH_TOKENS
from loraplex_training.errors import ExamplesError, TrainingError
from loraplex_training.examples import Chat, held_out

from .answer_scores import AnswerScorer, Evaluation
from .results import store_result
from .samples import Sample, TrainingData, first_prompts, n_tokens, sample_of
from .training_lines import TrainingLine
from .tuning import TuningPlan, TuningRun, shown_progress

_DEFAULT_BUDGET_S = 300.0
_AT_ONCE = 4  # jobs that train, each of another tenant
_MAX_JOBS = 4  # of a tenant, running or waiting
_HELD_OUT = 0.1  # share of the examples for validation, at least one example
_MAX_HELD_OUT_TOKENS = 8192  # a validation takes as long as a few steps
_MAX_LEN = 1024  # tokens of an example
_N_VALIDATIONS = 10
_BETA2 = 0.99  # of Adam, because most runs are short


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    name: str  # stored name
    chats: Sequence[Chat]
    description: str | None
    steps: int
    budget_s: float | None
    shape: AdapterShape
    lr: float
    seed: int
    replace: bool  # an existing name gets a new revision
    metric: str | None = None  # scores answers of the base and the adapter; a key of ``METRICS``


class Training:
    """Owner of the jobs that train on chats. Event loop only."""

    def __init__(
        self,
        store: AdapterStore,
        jobs: Jobs,
        thread: TrainingThread,
        workers: TenantThreads,
        tokenizer: PreTrainedTokenizerBase,
        scorer: AnswerScorer,
        *,
        base_name: str,
        max_len: int,
        max_budget_s: float,
    ) -> None:
        """``workers`` tokenise and store. ``max_len``: tokens of the base's context."""
        self._store, self._jobs, self._thread, self._workers = store, jobs, thread, workers
        self._tokenizer, self._scorer, self._base_name = tokenizer, scorer, base_name
        self._max_len = min(max_len, _MAX_LEN)
        self._max_budget_s = max_budget_s
        self._turns = TenantShares("adapters to train", _AT_ONCE, 1)
        self._n_jobs: Counter[str] = Counter()  # of each tenant, running or waiting

    async def start(self, request: TrainingRequest, access: AdapterAccess) -> Job:
        """Start a training job. Raises ApiError (400, 429)."""
        budget_s = self._budget(request.budget_s)
        tenant = access.tenant or ""
        await self._thread.check_base(tenant)
        if self._n_jobs[tenant] >= _MAX_JOBS:
            raise too_many(
                f"{_MAX_JOBS} jobs of this tenant are trained or wait for it; wait for one to end",
                "too_many_training_jobs",
                min(60.0, budget_s),
            )
        stop = asyncio.Event()
        work = partial(self._work, request, access, budget_s, stop)
        job = self._jobs.start_task(request.name, access, work, param="name")
        self._n_jobs[tenant] += 1
        job.cancel = stop.set
        job.training = shown_progress(Progress(), request.steps, len(request.chats))
        return job

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
        stop: asyncio.Event,
        job: Job,
    ) -> AdapterCard:
        tenant = access.tenant or ""
        try:
            await take_turn(self._turns, tenant, stop)
            try:
                return await self._train(request, access, budget_s, stop, job)
            finally:
                self._turns.release(tenant)
        except TrainingError as error:
            param = "examples" if isinstance(error, ExamplesError) else None
            raise invalid(str(error), param, "training_failed") from error
        finally:
            self._n_jobs[tenant] -= 1

    async def _train(
        self,
        request: TrainingRequest,
        access: AdapterAccess,
        budget_s: float,
        stop: asyncio.Event,
        job: Job,
    ) -> AdapterCard:
        """Raises JobCancelled, and TrainingError if no step fits the time."""
        tenant, deadline = access.tenant or "", time.monotonic() + budget_s
        out_of_time = TrainingError(
            f"{budget_s:g} seconds were over before the first step: reading the examples and "
            "validating the base take longer; raise budget_s"
        )

        def check_stop() -> None:
            if stop.is_set():
                raise JobCancelled

        def check() -> None:
            check_stop()
            if time.monotonic() > deadline:
                raise out_of_time

        job.tell("reading the examples", 0.0)
        data = await self._workers.run(tenant, partial(self._read, request, check))
        run = TuningRun(self._thread, tenant, _plan(request, data), data)
        job.tell("validating the base", 0.0)
        await run.begin(None, check)
        async for report in run.steps(max(1, request.steps // _N_VALIDATIONS), deadline):
            _show(job, run)
            job.tell("training", report.step / request.steps)
            check_stop()
        if run.progress.step == 0:
            raise out_of_time
        _show(job, run)
        evaluation: Evaluation | None = None
        if request.metric is not None:
            job.tell("evaluating", 1.0)
            evaluation = await self._scorer.evaluation(
                run, request.metric, access, check_stop, torch.float16
            )
            _show(job, run, evaluation)
        job.tell("storing", 1.0)
        record = _record(request, budget_s, run, evaluation)
        options = PutOptions(
            replace=request.replace,
            description=request.description,
            examples=data.prompts,
            provenance={"source": "trained", "training": record},
            quota=access.quota,
        )
        names = [request.name]
        return await store_result(
            run, self._base_name, self._store, names, options, self._workers, dtype=torch.float16
        )

    def _read(self, request: TrainingRequest, check: Callable[[], None]) -> TrainingData:
        """Tokenise the chats. Raises ExamplesError, and what ``check`` raises."""
        samples, digest = list[Sample](), sha256()
        for i, chat in enumerate(request.chats):
            check()
            digest.update(f"{json.dumps(chat.to_json())}\n".encode())
            roles = enumerate(message["role"] for message in chat.messages)
            line = TrainingLine((chat,), frozenset(n for n, role in roles if role == "assistant"))
            where = f"examples[{i}]"
            samples.append(sample_of(line, self._tokenizer, max_len=self._max_len, where=where))
        chosen = held_out(
            [n_tokens([sample]) for sample in samples],
            _HELD_OUT,
            max_tokens=_MAX_HELD_OUT_TOKENS,
            seed=request.seed,
        )
        return TrainingData(
            [sample for i, sample in enumerate(samples) if i not in chosen],
            [sample for i, sample in enumerate(samples) if i in chosen],
            digest.hexdigest(),
            first_prompts(request.chats),
        )


def _plan(request: TrainingRequest, data: TrainingData) -> TuningPlan:
    n = len(data.samples)
    return TuningPlan(
        method="supervised",
        n_steps=request.steps,
        batch_size=min(n, max(1, BATCH_TOKENS * n // n_tokens(data.samples))),
        lr=request.lr,
        seed=request.seed,
        shape=request.shape,
        beta2=_BETA2,
        keeps_best=True,
    )


def _show(job: Job, run: TuningRun, evaluation: Evaluation | None = None) -> None:
    assert job.training is not None
    n_examples = job.training["n_examples"]
    job.training = {**run.shown, "n_examples": n_examples, "evaluation": evaluation}


def _record(
    request: TrainingRequest, budget_s: float, run: TuningRun, evaluation: Evaluation | None
) -> dict[str, JsonValue]:
    """Return how the adapter was made, for its card."""
    progress = run.progress
    losses = {
        "train_loss": progress.train_loss,
        "validation_loss": progress.best_loss,
        "base_validation_loss": progress.base_loss,
    }
    return {
        **run.record,
        "recipe": request.shape.recipe,
        "lr": request.lr,
        "budget_s": budget_s,
        "stopped_by": run.stopped_by,
        "best_step": progress.best_step,
        **{name: None if loss is None else round(loss, 4) for name, loss in losses.items()},
        **({} if evaluation is None else {"evaluation": evaluation}),
    }
