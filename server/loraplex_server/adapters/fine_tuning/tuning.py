"""Fine-tunes one adapter, step by step, on the thread that trains. Can go on from a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import orjson
import torch
from torch import Tensor

from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_training import checkpoint
from loraplex_training.checkpoint import Progress
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import Work
from loraplex_training.engine.losses import dpo
from loraplex_training.schedule import rate_share

from .samples import Sample, SampleOrder, first, n_tokens
from .training_lines import Method

_SCORED_AT_ONCE = 64  # samples, between two checks
_JUDGED_TOKENS = 16_384  # of an evaluation
_WARMUP_STEPS = 10


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """The settings of a run. With the same samples, they decide the result to the bit."""

    method: Method
    n_steps: int
    batch_size: int  # samples
    lr: float
    seed: int
    shape: LoraShape
    beta: float = 0.1  # of dpo

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step: linear warm-up, then a cosine to a tenth."""
        warmup = min(_WARMUP_STEPS, max(1, self.n_steps // 10))
        return self.lr * rate_share(step, self.n_steps, warmup)


class Evaluation(NamedTuple):
    loss: float  # nats a learnt token; with dpo, the mean loss of a pair
    accuracy: float | None  # with dpo, the share of pairs whose preferred answer gained more


class StepReport(NamedTuple):
    step: int  # steps done
    train: Evaluation  # of the step's batch, before the step
    ends_epoch: bool


class TuningRun:
    """An adapter, its samples and its place in the run. Event loop only; one call at a time."""

    def __init__(
        self,
        thread: TrainingThread,
        tenant: str,
        plan: TuningPlan,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
    ) -> None:
        """``held_out`` may be empty; evaluations are then on the first training samples."""
        self.plan, self.progress = plan, Progress()
        self.adapter: LearningAdapter  # set by ``begin``
        self._thread, self._tenant = thread, tenant
        self._samples, self._judged = samples, first(held_out or samples, _JUDGED_TOKENS)
        self._order = SampleOrder(len(samples), plan.batch_size, plan.seed)
        self._references = torch.zeros(len(samples))
        self._judged_references = torch.zeros(len(self._judged))

    @property
    def n_samples(self) -> int:
        return len(self._samples)

    @property
    def epoch_steps(self) -> int:
        return self._order.epoch_steps

    async def begin(self, saved: Path, check: Callable[[], None]) -> None:
        """Make the adapter, or go on from the checkpoint ``saved`` if it exists.

        ``check`` is called often, and may raise to stop. Raises CheckpointError for the checkpoint
        of another run.
        """
        self.adapter = await self._thread.new_adapter(self.plan.shape, self.plan.seed)
        if saved.exists():
            await self._on_thread(lambda: self._load(saved))
            return
        if self.plan.method == "dpo":
            self._references = _margins(await self._sums(self._samples, check))
            self._judged_references = _margins(await self._sums(self._judged, check))
        self.progress.base_loss = (await self.evaluate()).loss

    def _load(self, saved: Path) -> None:
        self.progress, state = checkpoint.load(saved, self._fingerprint)
        self._references = state.pop("references")
        self._judged_references = state.pop("judged_references")
        self.adapter.load_state(state)

    async def step(self) -> StepReport:
        """Do one step. Raises TrainingError if the loss is not finite."""
        progress = self.progress
        at = self._order.at(progress.step)
        samples = [self._samples[i] for i in at.samples]
        if self.plan.method == "dpo":
            train, data = self._preferences(
                samples, await self._sums(samples), self._references[at.samples]
            )
        else:
            n = sum(float(datum.weights.sum()) for (datum,) in samples)
            train = None
            data = [replace(datum, weights=datum.weights / n) for (datum,) in samples]
        work = Work(self.adapter, data)
        loss = (await self._thread.forward_backward(self._tenant, work)).loss
        adam = Adam(self.plan.learning_rate(progress.step))
        await self._thread.step(self._tenant, self.adapter, adam)
        progress.step += 1
        progress.n_tokens += n_tokens(samples)
        progress.train_loss = loss if train is None else train.loss
        report = train or Evaluation(loss, None)
        return StepReport(progress.step, report, at.ends_epoch)

    async def evaluate(self) -> Evaluation:
        """Score the held-out samples, or the first training samples, without a gradient."""
        sums = await self._sums(self._judged)
        if self.plan.method == "dpo":
            return self._preferences(self._judged, sums, self._judged_references)[0]
        n = sum(float(datum.weights.sum()) for (datum,) in self._judged)
        return Evaluation(-sum(total for (total,) in sums) / n, None)

    async def save(self, path: Path) -> int:
        """Write a checkpoint to ``path``, atomically, and return its bytes."""

        def write() -> None:
            state = self.adapter.state()
            state["references"] = self._references
            state["judged_references"] = self._judged_references
            checkpoint.save(path, self._fingerprint, self.progress, state)

        await self._on_thread(write)
        return path.stat().st_size

    async def export(self, folder: Path, base_name: str) -> None:
        """Write the adapter as a PEFT folder. ``folder`` exists. Raises TrainingError."""
        await self._on_thread(lambda: self.adapter.save(folder, base_name))

    async def _on_thread(self, call: Callable[[], object]) -> None:
        await self._thread.run(self._tenant, lambda engine: call(), self.adapter)

    async def _sums(
        self, samples: Sequence[Sample], check: Callable[[], None] = lambda: None
    ) -> list[tuple[float, ...]]:
        """Return the summed log-probabilities of each sample's answers."""
        sums: list[tuple[float, ...]] = []
        for first_one in range(0, len(samples), _SCORED_AT_ONCE):
            check()
            part = samples[first_one : first_one + _SCORED_AT_ONCE]
            work = Work(self.adapter, [datum for sample in part for datum in sample])
            outcome = await self._thread.forward_backward(self._tenant, work, backward=False)
            totals = (float(logprobs.sum()) for logprobs in outcome.logprobs)
            sums += [tuple(next(totals) for _ in sample) for sample in part]
        return sums

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
        for sample in (*self._samples, *self._judged):
            for datum in sample:
                digest.update(datum.tokens.numpy().tobytes() + datum.weights.numpy().tobytes())
        return digest.hexdigest()


def _margins(sums: Sequence[tuple[float, ...]]) -> Tensor:
    """Return preferred − other of each pair, float32 [n_pairs]."""
    return torch.tensor([chosen - rejected for chosen, rejected in sums])
