"""Runs fine-tuning jobs on the event loop, and goes on with them after a restart.

read files ──▶ wait for a permit ──▶ steps on the thread that trains ──▶ store the result ──▶ end
                                      │ checkpoint every 30 s and at the end of each epoch
                                      └ stopped between steps: cancelled or paused

Each job is a task of `Jobs`, so that it counts in ``max_jobs`` and is shown by /v1/jobs, too.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar

import orjson
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.fine_tuning.answer_scores import AnswerScorer, Evaluation
from loraplex_server.adapters.fine_tuning.results import store_result
from loraplex_server.adapters.fine_tuning.samples import (
    Sample,
    TrainingData,
    first_prompts,
    n_tokens,
    sample_of,
)
from loraplex_server.adapters.fine_tuning.training_lines import parse_line
from loraplex_server.adapters.fine_tuning.tuning import TuningPlan, TuningRun, Validation
from loraplex_server.adapters.learning.jobs import Job, JobCancelled, Jobs, take_turn
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.api.request_info import BatchCaller
from loraplex_server.errors import ApiError, from_store, from_unexpected, invalid
from loraplex_server.health_tracker import log_extra
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantShares, TenantThreads
from loraplex_training.config import AdapterShape
from loraplex_training.errors import ExamplesError, TrainingError
from loraplex_training.examples import Chat
from loraplex_training.families.table import most_parameters

from .hyperparameters import resolved
from .records import TuningJob, TuningStatus, error_of
from .tuning_store import TuningStore

_T = TypeVar("_T")
_AT_ONCE = 16  # running jobs
_OF_TENANT = 4  # running jobs of a tenant
_SAVE_S = 30.0  # between two checkpoints to go on from
_N_CHECKPOINTS = 3  # that a job keeps, the result included
_N_EVALUATIONS = 10  # at least, of a job with a validation file
_MAX_LEN = 2048  # tokens of an example
_MAX_TOKENS = 10_000_000  # of a file, which are in memory during the job
_CURVE_POINTS = 100  # of the losses on the card
_OPEN = (TuningStatus.VALIDATING, TuningStatus.QUEUED, TuningStatus.RUNNING)
_log = logging.getLogger(__name__)


class TunedBase(NamedTuple):
    """The base that jobs train on."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_len: int  # tokens of its context


class FineTuning:
    """Owner of the running jobs. Event loop only.

    Calls of the store run on the one thread ``thread``; ``workers`` read files and store adapters.
    """

    def __init__(
        self,
        store: TuningStore,
        adapters: AdapterStore,
        jobs: Jobs,
        trainer: TrainingThread,
        base: TunedBase,
        *,
        thread: TenantThreads,
        workers: TenantThreads,
        scorer: AnswerScorer,
        access_of: Callable[[BatchCaller], AdapterAccess | None],
    ) -> None:
        """``access_of`` returns None if the API key no longer exists."""
        self.store, self.base = store, base
        self._adapters, self._jobs, self._trainer = adapters, jobs, trainer
        self._thread, self._workers, self._access_of = thread, workers, access_of
        self._scorer = scorer
        self._turns = TenantShares("fine-tuning jobs", _AT_ONCE, _OF_TENANT)
        self._running: dict[str, tuple[Job, asyncio.Event]] = {}  # the event asks to stop

    async def do(self, tenant: str, work: Callable[[], _T]) -> _T:
        """Run a call of the store. Raises ApiError: 429, or that of the call."""
        return await self._thread.run(tenant, work)

    async def start(self) -> None:
        """Go on with unfinished jobs, at the start of the server."""
        for job in await self.do("", self.store.unfinished):
            try:
                self._start(job)
            except ApiError as error:
                await self._fail(job, error)

    async def create(self, job: TuningJob) -> TuningJob:
        """Add a job and start it.

        Raises ApiError: 400 for a base that cannot be trained, 429 for too many jobs of the tenant.
        """
        await self._trainer.check_base(job.caller.tenant)
        await self.do(job.caller.tenant, lambda: self.store.add(job))
        try:
            self._start(job)
        except ApiError:
            await self.do(job.caller.tenant, lambda: self.store.remove(job.id))
            raise
        return job

    async def cancel(self, tenant: str, job_id: str) -> TuningJob:
        """Raises ApiError: 404, or 409 for a job that has ended."""
        return await self._stop(
            tenant, job_id, TuningStatus.CANCELLED, (*_OPEN, TuningStatus.PAUSED)
        )

    async def pause(self, tenant: str, job_id: str) -> TuningJob:
        """Raises ApiError: 404, or 409 for a job that has ended or is paused."""
        return await self._stop(tenant, job_id, TuningStatus.PAUSED, _OPEN)

    async def resume(self, tenant: str, job_id: str) -> TuningJob:
        """Go on with a paused job. Raises ApiError: 404, 409, or 429 for too many jobs."""
        job = await self.do(tenant, lambda: self.store.job(tenant, job_id))
        if (running := self._running.get(job_id)) is not None and running[1].is_set():
            await self._jobs.wait(running[0], None)  # its last step
        paused, queued = TuningStatus.PAUSED, TuningStatus.QUEUED
        move = partial(self.store.move, job, queued, "The job is resumed", sources=(paused,))
        job = await self.do(tenant, move)
        try:
            self._start(job)
        except ApiError as error:
            back = partial(self.store.move, job, paused, error.message, sources=(queued,))
            await self.do(tenant, back)
            raise
        return job

    async def wait(self, tenant: str, job_id: str, timeout_s: float) -> TuningJob:
        """Return the job, once it has ended or paused, or after ``timeout_s``.

        Raises ApiError (404).
        """
        job = await self.do(tenant, lambda: self.store.job(tenant, job_id))
        if timeout_s and (running := self._running.get(job_id)) is not None:
            await self._jobs.wait(running[0], timeout_s)
            job = await self.do(tenant, lambda: self.store.job(tenant, job_id))
        return job

    async def close(self) -> None:
        """Stop the jobs. The next start goes on from their checkpoints."""
        tasks = [job.task for job, _ in self._running.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _stop(
        self, tenant: str, job_id: str, status: TuningStatus, sources: tuple[TuningStatus, ...]
    ) -> TuningJob:
        job = await self.do(tenant, lambda: self.store.job(tenant, job_id))
        move = partial(self.store.move, job, status, f"The job is {status.value}", sources=sources)
        job = await self.do(tenant, move)
        if (running := self._running.get(job_id)) is not None:
            running[1].set()
        return job

    def _start(self, job: TuningJob) -> None:
        """Raises ApiError: 401 without the API key, 429 if the tenant runs too many jobs."""
        access = self._access_of(job.caller)
        if access is None:
            raise ApiError(
                401, "the API key that made this job is no longer valid", code="invalid_api_key"
            )
        stop = asyncio.Event()
        work = partial(self._work, job, access, stop)
        name = access.own(job.fine_tuned_model)
        shown = self._jobs.start_task(name, access, work, param="adapter", job_id=job.id)
        shown.cancel = partial(self._cancel_soon, job)
        self._running[job.id] = shown, stop

    def _cancel_soon(self, job: TuningJob) -> None:
        """Cancel a job that /v1/jobs shows."""
        task = asyncio.get_running_loop().create_task(self.cancel(job.caller.tenant, job.id))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _work(
        self, job: TuningJob, access: AdapterAccess, stop: asyncio.Event, shown: Job
    ) -> AdapterCard:
        try:
            data = await self._read(job)
            job, plan = await self._plan(job, access, data)
            await take_turn(self._turns, job.caller.tenant, stop)
            try:
                return await self._train(job, access, stop, shown, plan, data)
            finally:
                self._turns.release(job.caller.tenant)
        except (JobCancelled, asyncio.CancelledError):
            raise
        except Exception as error:
            failure = self._error_of(job, error, access)
            if failure.code == "wrong_job_status":  # paused or cancelled meanwhile
                raise JobCancelled from None
            await self._fail(job, failure)
            raise failure from None
        finally:
            del self._running[job.id]

    async def _read(self, job: TuningJob) -> TrainingData:
        """Read and tokenise the files. Raises ApiError, which names the file and the line."""
        tenant = job.caller.tenant
        if job.status is TuningStatus.VALIDATING:
            await self._event(job, f"Validating training file: {job.training_file}")
        read = partial(self._samples, job.training_file, "training_file")
        data = await self._workers.run(tenant, read)
        if job.validation_file is not None:
            read = partial(self._samples, job.validation_file, "validation_file")
            data = data._replace(held_out=(await self._workers.run(tenant, read)).samples)
        return data

    def _samples(self, file_id: str, param: str) -> TrainingData:
        """Read a file, of which nothing is held out. Raises ApiError (400)."""
        try:
            path = self.store.files.path(file_id)
            return self._tokenised(path, param.replace("_", " "))
        except ExamplesError as error:
            raise invalid(str(error), param, f"invalid_{param}") from error

    def _tokenised(self, path: Path, what: str) -> TrainingData:
        samples, chats, digest, total = list[Sample](), list[Chat](), sha256(), 0
        max_len = min(self.base.max_len, _MAX_LEN)
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                digest.update(text)
                if not text.strip():
                    continue
                where = f"line {number} of the {what}"
                line = parse_line(orjson.loads(text))
                sample = sample_of(line, self.base.tokenizer, max_len=max_len, where=where)
                total += n_tokens([sample])
                if total > _MAX_TOKENS:
                    raise ExamplesError(
                        f"the {what} has more than {_MAX_TOKENS:,} tokens up to line {number}; "
                        "split it"
                    )
                samples.append(sample)
                chats.append(line.chats[0])
        return TrainingData(samples, [], digest.hexdigest(), first_prompts(chats))

    async def _plan(
        self, job: TuningJob, access: AdapterAccess, data: TrainingData
    ) -> tuple[TuningJob, TuningPlan]:
        """Resolve the hyperparameters and count the job's bytes and tokens. Raises ApiError."""
        tenant = job.caller.tenant
        numbers, lr = resolved(job.method, job.hyperparameters, len(data.samples))
        n_steps = numbers["n_epochs"] * -(-len(data.samples) // numbers["batch_size"])
        plan = TuningPlan(
            method=job.method,
            n_steps=int(n_steps),
            batch_size=int(numbers["batch_size"]),
            lr=lr,
            seed=job.seed,
            shape=AdapterShape.of_settings(job.shape),
            beta=float(numbers.get("beta", 0.0)),
        )
        n_trained = int(numbers["n_epochs"]) * n_tokens(data.samples)
        n_parameters = await self._trainer.run(
            tenant, lambda engine: most_parameters(plan.shape, engine.model.linears)
        )
        n_bytes = 3 * 4 * n_parameters  # with Adam's moments
        if access.tenant is not None:
            n_stored = await self._workers.run(
                tenant, partial(self._adapters.n_bytes_beside, access.tenant, None)
            )
            access.quota.check_bytes(n_stored + n_bytes)

        def reserve() -> TuningJob:
            self.store.reserve(
                job, n_bytes=n_bytes, n_tokens=n_trained, max_tokens=access.max_training_tokens
            )
            return self.store.move(
                job,
                TuningStatus.QUEUED,
                "Files validated, moving job to queued state",
                sources=_OPEN,
                hyperparameters=numbers,
                n_tokens=n_trained,
            )

        return await self.do(tenant, reserve), plan

    async def _train(
        self,
        job: TuningJob,
        access: AdapterAccess,
        stop: asyncio.Event,
        shown: Job,
        plan: TuningPlan,
        data: TrainingData,
    ) -> AdapterCard:
        tenant = job.caller.tenant
        saved = self.store.checkpoint_path(job.id)

        def check() -> None:
            if stop.is_set():
                raise JobCancelled

        check()
        start = partial(
            self.store.move, job, TuningStatus.RUNNING, "Fine-tuning job started", sources=_OPEN
        )
        job = await self.do(tenant, start)
        run = TuningRun(self._trainer, tenant, plan, data)
        await run.begin(saved, check)
        if first_step := run.progress.step:
            await self.do(tenant, lambda: self.store.rewind(job.id, first_step))
            await self._event(job, f"Going on from the checkpoint of step {first_step}")
        last_save = last_checkpoint = time.monotonic()
        every = max(1, plan.n_steps // _N_EVALUATIONS) if data.held_out else plan.n_steps
        async for report in run.steps(every):
            now, valid = time.monotonic(), report.valid
            # Each of the last epochs ends with a checkpoint. Earlier ones that are short do so only
            # now and then, since their checkpoints would not be kept.
            n_left = -(-(plan.n_steps - report.step) // run.epoch_steps)
            is_checkpoint = report.ends_epoch and (
                n_left < _N_CHECKPOINTS or now - last_checkpoint > _SAVE_S
            )
            metrics: dict[str, object] = {
                "step": report.step,
                "total_steps": plan.n_steps,
                "train_loss": round(report.train.loss, 6),
            }
            if report.train.accuracy is not None:
                metrics["train_accuracy"] = round(report.train.accuracy, 4)
            if is_checkpoint and data.held_out and valid is None:
                valid = await run.evaluate()
            if data.held_out and valid is not None:
                metrics |= _of_validation(valid)
            await self._tell(job, shown, run, metrics)
            if report.step == plan.n_steps:
                continue
            if is_checkpoint:
                await self._checkpoint(job, access, run, metrics)
                last_checkpoint = time.monotonic()
            if stop.is_set() or report.ends_epoch or now - last_save > _SAVE_S:
                await run.save(saved)
                last_save = time.monotonic()
            check()
        check()
        shown.training = run.shown
        scores: Evaluation | None = None
        if job.metric is not None:
            shown.tell("evaluating", 1.0)
            scores = await self._scorer.evaluation(run, job.metric, access, check)
            await self._event(job, _told(scores), level="warn" if "error" in scores else "info")
            shown.training = {**run.shown, "evaluation": scores}
        shown.tell("storing", 1.0)
        card = await self._store_result(job, access, run, data, scores)
        await self.do(tenant, lambda: self.store.finish(job, scores))
        return card

    async def _tell(
        self,
        job: TuningJob,
        shown: Job,
        run: TuningRun,
        metrics: Mapping[str, object],
    ) -> None:
        """Write the event of a step, and show the progress in /v1/jobs."""
        step, n_steps, loss = run.progress.step, run.plan.n_steps, metrics["train_loss"]
        estimate = int(time.time() + run.seconds_left)
        text = f"Step {step}/{n_steps}: training loss={loss:.4f}"
        if "valid_loss" in metrics:
            text += f", validation loss={metrics['valid_loss']:.4f}"
        await self.do(
            f"tuning:{job.caller.tenant}",
            lambda: self.store.add_metrics(job.id, text, metrics, estimated_finish=estimate),
        )
        shown.training = run.shown
        shown.tell("training", step / n_steps)

    async def _checkpoint(
        self, job: TuningJob, access: AdapterAccess, run: TuningRun, metrics: Mapping[str, object]
    ) -> None:
        """Store the adapter of a step under a name of its own. A full quota only skips it."""
        step = run.progress.step
        name = f"{job.fine_tuned_model}.ckpt-step-{step}"
        provenance: dict[str, JsonValue] = {"source": "fine-tuned", "job": job.id, "step": step}
        try:
            await self._put(job, access, run, [access.own(name)], provenance)
        except StoreError as error:
            await self._event(job, f"No checkpoint at step {step}: {error}", level="warn")
            return
        await self._keep(job, access, name, step, metrics)

    async def _keep(
        self,
        job: TuningJob,
        access: AdapterAccess,
        name: str,
        step: int,
        metrics: Mapping[str, object],
    ) -> None:
        """List a checkpoint, and delete the oldest beyond the limit."""
        shown = {key: value for key, value in metrics.items() if key != "total_steps"}
        add = partial(self.store.add_checkpoint, job, name, step, shown, n_kept=_N_CHECKPOINTS)
        for old in await self.do(job.caller.tenant, add):
            if old != job.fine_tuned_model and self._adapters.has_name(access.own(old)):
                delete = partial(self._adapters.start_delete, access.own(old))
                await self._workers.run(job.caller.tenant, delete)

    async def _store_result(
        self,
        job: TuningJob,
        access: AdapterAccess,
        run: TuningRun,
        data: TrainingData,
        scores: Evaluation | None,
    ) -> AdapterCard:
        """Store the adapter under its names. Raises StoreError; then no name has changed."""
        progress, after = run.progress, run.valid
        history = await self.do(job.caller.tenant, lambda: self.store.metrics(job.id))
        every = -(-len(history) // _CURVE_POINTS)
        shown = history[::every] + ([] if (len(history) - 1) % every == 0 else history[-1:])
        before = None if progress.base_loss is None else round(progress.base_loss, 6)
        training: dict[str, JsonValue] = {
            **run.record,
            "job": job.id,
            "method": job.method,
            "hyperparameters": dict(job.hyperparameters),
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "loss_curve": [[each["step"], each["train_loss"]] for each in shown],
            "evaluation": {
                "on": "validation file" if data.held_out else "first training examples",
                "loss_before": before,
                "loss_after": None if after is None else round(after.loss, 6),
                "exact_before": progress.base_exact,
                "exact_after": None if after is None else after.exact,
                **(scores or {}),
            },
        }
        names = [access.own(job.fine_tuned_model), *([job.adapter] if job.adapter else [])]
        provenance: dict[str, JsonValue] = {"source": "fine-tuned", "training": training}
        card = await self._put(job, access, run, names, provenance, data.prompts)
        metrics = {**history[-1], **(scores or {})}
        await self._keep(job, access, job.fine_tuned_model, progress.step, metrics)
        return card

    async def _put(
        self,
        job: TuningJob,
        access: AdapterAccess,
        run: TuningRun,
        names: list[str],
        provenance: Mapping[str, JsonValue],
        prompts: tuple[str, ...] = (),
    ) -> AdapterCard:
        """Store the adapter under all ``names`` or under none. Raises StoreError."""
        options = PutOptions(examples=prompts, provenance=provenance, quota=access.quota)
        return await store_result(
            run, self.base.name, self._adapters, names, options, self._workers
        )

    async def _event(self, job: TuningJob, message: str, *, level: str = "info") -> None:
        tenant = job.caller.tenant
        await self.do(tenant, partial(self.store.add_event, job.id, message, level=level))

    async def _fail(self, job: TuningJob, error: ApiError) -> None:
        move = partial(
            self.store.move,
            job,
            TuningStatus.FAILED,
            f"The job failed: {error.message}",
            sources=_OPEN,
            error=error_of(error),
        )
        await self.do(job.caller.tenant, move)

    def _error_of(self, job: TuningJob, error: Exception, access: AdapterAccess) -> ApiError:
        match error:
            case ApiError():
                return error
            case TrainingError():
                return invalid(str(error), None, "training_failed")
            case StoreError():
                return from_store(error, param="adapter", access=access)
        _log.error("%s failed", job.id, exc_info=error, extra=log_extra(error))
        return from_unexpected(error, job.id)


def _told(scores: Evaluation) -> str:
    if "error" in scores:
        return f"The answers are not scored: {scores['error']}"
    return (
        f"{scores['metric']} of {scores['n_answers']} answers: {scores['score_before']} before, "
        f"{scores['score_after']} after"
    )


def _of_validation(valid: Validation) -> dict[str, object]:
    """Return the metrics of a step as OpenAI names them, and the share of exact answers."""
    metrics: dict[str, object] = {}
    for prefix in ("valid", "full_valid"):
        metrics[f"{prefix}_loss"] = round(valid.loss, 6)
        if valid.token_accuracy is not None:
            metrics[f"{prefix}_mean_token_accuracy"] = round(valid.token_accuracy, 4)
    if valid.exact is not None:
        metrics["valid_exact"] = round(valid.exact, 4)
    return metrics
