"""Trains one adapter, step by step, on the thread that trains. Can go on from a checkpoint."""

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import orjson
import torch
from torch import Tensor

from loraplex_adapter_store.report import JsonValue
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_training import checkpoint
from loraplex_training.checkpoint import Progress
from loraplex_training.config import AdapterShape
from loraplex_training.engine.adapter import Adam, LearningAdapter
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import Work
from loraplex_training.engine.losses import dpo
from loraplex_training.families.table import lora_shape, new_adapter
from loraplex_training.schedule import rate_share

from .samples import Sample, SampleOrder, TrainingData, first, n_tokens
from .training_lines import Method

_SCORED_AT_ONCE = 64  # samples, between two checks
_JUDGED_TOKENS = 16_384  # of an evaluation
_WARMUP_STEPS = 10
_SPARE = 1.5  # times the last step and evaluation: the time that is reserved for the next


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """The settings of a run. With the same samples, they decide the result to the bit."""

    method: Method
    n_steps: int
    batch_size: int  # samples
    lr: float
    seed: int
    shape: AdapterShape
    beta: float = 0.1  # of dpo
    beta2: float = 0.999  # of Adam
    keeps_best: bool = False  # the result has the weights with the lowest evaluated loss

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step: linear warm-up, then a cosine to a tenth."""
        warmup = min(_WARMUP_STEPS, max(1, self.n_steps // 10))
        return self.lr * rate_share(step, self.n_steps, warmup)


class Evaluation(NamedTuple):
    loss: float  # nats a learnt token; with dpo, the mean loss of a pair
    accuracy: float | None  # with dpo, the share of pairs whose preferred answer gained more


class Validation(NamedTuple):
    """Scores on the held-out samples. Shares are None with dpo."""

    loss: float
    exact: float | None  # share of the answers that greedy decoding gives whole
    token_accuracy: float | None  # share of their tokens, each after the right ones


@dataclass(slots=True)
class _Scored:
    sums: list[tuple[float, ...]]  # the summed log-probabilities of each sample's answers
    n_exact: int = 0  # answers that greedy decoding gives whole
    n_right: int = 0  # their tokens


class StepReport(NamedTuple):
    step: int  # steps done
    train: Evaluation  # of the step's batch, before the step
    ends_epoch: bool
    valid: Validation | None = None  # an evaluation after the step


def shown_progress(
    progress: Progress,
    n_steps: int,
    n_examples: int,
    *,
    valid: float | None = None,
    stopped_by: str | None = None,
) -> dict[str, object]:
    """Return the progress as jobs show it."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    return {
        "step": progress.step,
        "n_steps": n_steps,
        "n_examples": n_examples,
        "loss": rounded(progress.train_loss),
        "validation_loss": rounded(valid),
        "base_validation_loss": rounded(progress.base_loss),
        "tokens_per_s": round(progress.n_tokens / progress.seconds, 1) if progress.step else None,
        "stopped_by": stopped_by,
        "evaluation": None,
    }


class TuningRun:
    """An adapter, its samples and its place in the run. Event loop only; one call at a time."""

    def __init__(
        self,
        thread: TrainingThread,
        tenant: str,
        plan: TuningPlan,
        data: TrainingData,
    ) -> None:
        """Without held-out samples, evaluations are on the first training samples."""
        self.plan, self.tenant, self.progress = plan, tenant, Progress()
        self.adapter: LearningAdapter  # set by ``begin``
        self.valid: Validation | None = None  # the last evaluation
        self.stopped_by: Literal["steps", "time"] | None = None  # None: before the end
        self._thread, self._data, self._samples = thread, data, data.samples
        self.judged = first(data.held_out or data.samples, _JUDGED_TOKENS)
        self._order = SampleOrder(len(data.samples), plan.batch_size, plan.seed)
        self._references = torch.zeros(len(data.samples))
        self._judged_references = torch.zeros(len(self.judged))
        self._best: dict[str, Tensor] = {}
        self._began, self._first_step = time.monotonic(), 0
        self._before_s = 0.0  # of the runs that the checkpoint comes from
        self._step_s = self._judging_s = 0.0  # duration of the last step and evaluation

    @property
    def epoch_steps(self) -> int:
        return self._order.epoch_steps

    @property
    def seconds_left(self) -> float:
        """The time of the remaining steps, at the mean speed of this run's steps."""
        step = self.progress.step
        rate_s = (time.monotonic() - self._began) / (step - self._first_step)
        return (self.plan.n_steps - step) * rate_s

    @property
    def shown(self) -> dict[str, object]:
        """The progress as jobs show it."""
        return shown_progress(
            self.progress,
            self.plan.n_steps,
            len(self._samples),
            valid=None if self.valid is None else self.valid.loss,
            stopped_by=self.stopped_by,
        )

    @property
    def record(self) -> dict[str, JsonValue]:
        """Return how the adapter was trained, as its card shows it."""
        return {
            "seed": self.plan.seed,
            "family": self.plan.shape.family,
            "rank": self.plan.shape.rank,
            "alpha": self.plan.shape.alpha,
            "data_sha256": self._data.sha256,
            "n_examples": len(self._samples),
            "n_validation": len(self._data.held_out),
            "n_tokens": self.progress.n_tokens,
            "steps_done": self.progress.step,
            "n_steps": self.plan.n_steps,
            "seconds": round(self.progress.seconds, 1),
        }

    async def begin(self, saved: Path | None, check: Callable[[], None]) -> None:
        """Make the adapter, or go on from the checkpoint ``saved`` if it exists.

        ``check`` is called often, and may raise to stop. Raises TrainingError, also for the
        checkpoint of another run.
        """
        plan, data = self.plan, [datum for sample in self._samples for datum in sample]
        self.adapter = await self._thread.run(
            self.tenant,
            lambda engine: new_adapter(engine, plan.shape, plan.seed, data),
        )
        if saved is not None and saved.exists():
            await self._on_thread(lambda: self._load(saved))
            return
        base = LearningAdapter(lora_shape(plan.shape), {})
        if plan.method == "dpo":
            for_all = await self._scored(self._samples, base, check)
            judged = await self._scored(self.judged, base, check)
            self._references = _margins(for_all.sums)
            self._judged_references = _margins(judged.sums)
        before = await self._judge(base, check)
        self.progress.base_loss, self.progress.base_exact = before.loss, before.exact

    def _load(self, saved: Path) -> None:
        self.progress, state = checkpoint.load(saved, self._fingerprint)
        self._first_step, self._before_s = self.progress.step, self.progress.seconds
        self._references = state.pop("references")
        self._judged_references = state.pop("judged_references")
        self.adapter.load_state(state)

    async def steps(self, every: int, deadline: float = math.inf) -> AsyncIterator[StepReport]:
        """Do the remaining steps, and evaluate after each ``every`` steps and the last.

        Stops before ``deadline``, a value of time.monotonic, once the time left may be too short
        for another step and its evaluation. Raises TrainingError if the loss is not finite.
        """

        def is_late() -> bool:
            spare_s = _SPARE * (self._step_s + self._judging_s)
            return time.monotonic() + spare_s >= deadline

        progress, n_steps = self.progress, self.plan.n_steps
        is_last = progress.step == n_steps or is_late()
        while not is_last:
            report = await self._step()
            is_last = report.step == n_steps or is_late()
            if is_last or report.step % every == 0:
                report = report._replace(valid=await self.evaluate())
                is_last = is_last or is_late()
            yield report
        self.stopped_by = "steps" if progress.step == n_steps else "time"

    async def _step(self) -> StepReport:
        began, progress = time.monotonic(), self.progress
        at = self._order.at(progress.step)
        samples = [self._samples[i] for i in at.samples]
        if self.plan.method == "dpo":
            train, data = self._preferences(
                samples,
                (await self._scored(samples, self.adapter)).sums,
                self._references[at.samples],
            )
        else:
            n = sum(float(datum.weights.sum()) for (datum,) in samples)
            train = None
            data = [replace(datum, weights=datum.weights / n) for (datum,) in samples]
        work = Work(self.adapter, data)
        loss = (await self._thread.forward_backward(self.tenant, work)).loss
        adam = Adam(self.plan.learning_rate(progress.step), beta2=self.plan.beta2)
        await self._thread.step(self.tenant, self.adapter, adam)
        report = train or Evaluation(loss, None)
        progress.stepped(report.loss, n_tokens(samples))
        now = time.monotonic()
        self._step_s, progress.seconds = now - began, self._before_s + now - self._began
        return StepReport(progress.step, report, at.ends_epoch)

    async def evaluate(self) -> Validation:
        """Return the scores on the held-out samples, or on the first training samples."""
        self.valid = valid = await self._judge(self.adapter)
        if self.progress.validated(valid.loss) and self.plan.keeps_best:
            await self._on_thread(self._keep_weights)
        return valid

    def _keep_weights(self) -> None:
        self._best = self.adapter.weights()

    async def _judge(
        self, adapter: LearningAdapter, check: Callable[[], None] = lambda: None
    ) -> Validation:
        began = time.monotonic()
        scored = await self._scored(self.judged, adapter, check)
        self._judging_s = time.monotonic() - began
        if self.plan.method == "dpo":
            references = self._judged_references
            loss = self._preferences(self.judged, scored.sums, references)[0].loss
            return Validation(loss, None, None)
        n = sum(float(datum.weights.sum()) for (datum,) in self.judged)
        n_tokens = sum(datum.n_answers for (datum,) in self.judged)
        return Validation(
            -sum(total for (total,) in scored.sums) / n,
            scored.n_exact / len(self.judged),
            scored.n_right / n_tokens,
        )

    async def save(self, path: Path) -> int:
        """Write a checkpoint to ``path``, atomically, and return its bytes."""

        def write() -> None:
            state = self.adapter.state()
            state["references"] = self._references
            state["judged_references"] = self._judged_references
            checkpoint.save(path, self._fingerprint, self.progress, state)

        await self._on_thread(write)
        return path.stat().st_size

    async def export(
        self, folder: Path, base_name: str, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write the adapter as a PEFT folder. ``folder`` exists. Raises TrainingError."""

        def write() -> None:
            if self._best:
                self.adapter.load_state(self._best)
            self.adapter.save(folder, base_name, dtype)

        await self._on_thread(write)

    async def _on_thread(self, call: Callable[[], object]) -> None:
        await self._thread.run(self.tenant, lambda engine: call(), self.adapter)

    async def _scored(
        self,
        samples: Sequence[Sample],
        adapter: LearningAdapter,
        check: Callable[[], None] = lambda: None,
    ) -> _Scored:
        scored = _Scored([])
        for first_one in range(0, len(samples), _SCORED_AT_ONCE):
            check()
            part = samples[first_one : first_one + _SCORED_AT_ONCE]
            work = Work(adapter, [datum for sample in part for datum in sample])
            outcome = await self._thread.forward_backward(self.tenant, work, backward=False)
            totals = (float(logprobs.sum()) for logprobs in outcome.logprobs)
            scored.sums += [tuple(next(totals) for _ in sample) for sample in part]
            scored.n_exact += sum(outcome.right)
            scored.n_right += outcome.n_right
        return scored

    def _preferences(
        self, samples: Sequence[Sample], sums: Sequence[tuple[float, ...]], references: Tensor
    ) -> tuple[Evaluation, list[Datum]]:
        """Return the loss of pairs, and data whose cross-entropy has the gradient of that loss.

        DPO's loss depends on two log-probabilities a pair. Its derivative by each is a number, the
        weight of all tokens of that answer.
        """
        totals = torch.tensor(sums, requires_grad=True)  # [n_pairs, 2]
        losses = [
            dpo(chosen, rejected, reference, self.plan.beta)
            for (chosen, rejected), reference in zip(totals, references, strict=True)
        ]
        loss = torch.stack(losses).mean()
        (slopes,) = torch.autograd.grad(loss, totals)
        data = [
            replace(datum, weights=datum.weights * -slope)
            for sample, row in zip(samples, slopes, strict=True)
            for datum, slope in zip(sample, row, strict=True)
        ]
        gains = _margins(sums) - references
        return Evaluation(float(loss), float((gains > 0).float().mean())), data

    @cached_property
    def _fingerprint(self) -> str:
        """The digest of all that the result depends on. Reads all samples once."""
        digest = sha256(orjson.dumps(asdict(self.plan)))
        for sample in (*self._samples, *self.judged):
            for datum in sample:
                digest.update(datum.tokens.numpy().tobytes() + datum.weights.numpy().tobytes())
        return digest.hexdigest()


def _margins(sums: Sequence[tuple[float, ...]]) -> Tensor:
    """Return preferred − other of each pair, float32 [n_pairs]."""
    return torch.tensor([chosen - rejected for chosen, rejected in sums])
