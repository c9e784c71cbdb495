"""A run of `loraplex train` on the training engine: data, adapter and progress."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .batches import endless
from .checkpoint import Progress
from .config import PLAIN, TrainingConfig
from .engine.adapter import WEIGHTS, Adam, LearningAdapter
from .engine.data import Datum
from .engine.dtype import compute_dtype
from .engine.engine import TrainingEngine, Work
from .engine.frozen_model import FrozenModel
from .engine.model_weights import ModelWeights
from .errors import TrainingError
from .examples import Example, held_out, read_jsonl, tokenise
from .families.table import new_adapter
from .schedule import rate_share
from .starting_adapter import StartingAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # of the checkpoint; raise it when old checkpoints cannot be resumed exactly
_BETA2 = 0.99  # of Adam, because most runs are short


class StepReport(NamedTuple):
    step: int  # steps done
    steps: int  # steps planned
    train_loss: float | None
    validation_loss: float | None  # of the last validation; None before the first
    base_validation_loss: float | None  # before the first step
    tokens_per_s: float


class TrainedAdapter(NamedTuple):
    folder: Path
    n_parameters: int
    n_bytes: int  # of adapter_model.safetensors
    progress: Progress
    validation_loss: float | None  # of the weights that were written
    base_validation_loss: float | None  # of the base without the adapter, if the run began there


OnStep = Callable[[StepReport], None]


@dataclass(frozen=True, slots=True)
class _Data:
    train: list[Example]
    validation: list[Example]
    sha256: str


class Run:
    """The state of a run in memory: the engine, the adapter and the progress."""

    def __init__(self, config: TrainingConfig, path: Path) -> None:
        from transformers import AutoTokenizer  # takes seconds

        self._config = config
        self._path = path
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        tokenizer = AutoTokenizer.from_pretrained(config.base)
        if not (config.chat_template or tokenizer.chat_template):
            raise TrainingError(f"{config.base} has no chat template; use an instruct model")
        if config.start is not None and config.shape.recipe != PLAIN:
            raise TrainingError("a recipe begins with its own start; leave out --start")
        self._start = None
        if config.start is not None:
            self._start = StartingAdapter.read(config.start, config.shape)
        self._data = _read(config, tokenizer)
        self._fingerprint = _fingerprint(config, self._data, self._start)
        self._engine = _engine(config)
        data = [_datum(example, 1.0) for example in self._data.train]
        self._adapter = new_adapter(self._engine, config.shape, config.schedule.seed, data)
        if self._start is not None:
            self._adapter.start_from(self._start.tensors)
        self._progress = Progress()
        self._best: dict[str, Tensor] = {}
        self._validation_loss: float | None = None

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        if not self._path.is_file():
            return
        self._progress, tensors = checkpoint.load(self._path, self._fingerprint)
        self._adapter.load_state(tensors)
        self._best = {
            name.removeprefix("best."): tensor
            for name, tensor in tensors.items()
            if name.startswith("best.")
        }

    def loop(self, on_step: OnStep) -> None:
        schedule, progress = self._config.schedule, self._progress
        lengths = [len(example) for example in self._data.train]
        groups = endless(lengths, schedule.batch_tokens, schedule.seed)
        for _ in range(progress.step):
            next(groups)
        started = saved = time.monotonic()
        before_s, before_tokens = progress.seconds, progress.n_tokens
        if self._data.validation and progress.step == 0:
            self._validate()
        while progress.step < schedule.steps and not self._stalled():
            self._step([self._data.train[i] for i in next(groups)])
            now = time.monotonic()
            progress.seconds = before_s + now - started
            last = progress.step == schedule.steps
            if self._data.validation and (progress.step % schedule.validate_every == 0 or last):
                self._validate()
            if now - saved > schedule.checkpoint_every_s:
                self.checkpoint()
                saved = now
            rate = (progress.n_tokens - before_tokens) / (now - started)
            on_step(
                StepReport(
                    progress.step,
                    schedule.steps,
                    progress.train_loss,
                    self._validation_loss,
                    progress.base_loss,
                    rate,
                )
            )

    def checkpoint(self) -> None:
        if self._progress.step == 0:
            return
        tensors = self._adapter.state() | {
            f"best.{name}": tensor for name, tensor in self._best.items()
        }
        checkpoint.save(self._path, self._fingerprint, self._progress, tensors)

    def export(self) -> TrainedAdapter:
        """Write the card and the best weights; without validation, the last weights."""
        config, out = self._config, self._config.out
        if self._best:
            self._adapter.load_state(self._best)
        fresh = out / ".training" / "out"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        dtype = getattr(torch, config.shape.stored_dtype)
        self._adapter.save(fresh, config.base_name, dtype)
        if config.chat_template is not None:
            (fresh / "chat_template.jinja").write_text(config.chat_template, encoding="utf-8")
        (fresh / "card.json").write_text(json.dumps(self._card(), indent=2) + "\n")
        # Readers look for adapter_config.json, so it comes last.
        for file in sorted(fresh.iterdir(), reverse=True):
            file.replace(out / file.name)
        return TrainedAdapter(
            folder=out,
            n_parameters=self._adapter.n_parameters,
            n_bytes=(out / WEIGHTS).stat().st_size,
            progress=self._progress,
            validation_loss=self._progress.best_loss,
            base_validation_loss=None if self._start else self._progress.base_loss,
        )

    def _step(self, examples: list[Example]) -> None:
        schedule, progress = self._config.schedule, self._progress
        share = rate_share(progress.step, schedule.steps, schedule.warmup_steps)
        n = sum(sum(example.learn[1:]) for example in examples)
        work = Work(self._adapter, [_datum(example, 1 / n) for example in examples])
        (outcome,) = self._engine.forward_backward([work])
        if not math.isfinite(outcome.loss):
            raise TrainingError(
                f"the loss is {outcome.loss} at step {progress.step}; lower the learning rate"
            )
        adam = Adam(schedule.lr * share, beta2=_BETA2, weight_decay=schedule.weight_decay)
        self._engine.step(self._adapter, adam)
        progress.stepped(outcome.loss, outcome.n_tokens)

    def _validate(self) -> None:
        """Validate, and record the loss and the best weights."""
        progress, adapter = self._progress, self._adapter
        if progress.step == 0 and self._start is None:
            adapter = LearningAdapter(self._adapter.shape, {})  # the base
        work = Work(adapter, [_datum(example, 1.0) for example in self._data.validation])
        (outcome,) = self._engine.forward_backward([work], backward=False)
        n = sum(sum(example.learn[1:]) for example in self._data.validation)
        self._validation_loss = loss = outcome.loss / n
        if progress.step == 0:
            progress.base_loss = loss
        elif progress.validated(loss):
            self._best = self._adapter.weights()

    def _stalled(self) -> bool:
        patience = self._config.schedule.patience
        return patience is not None and self._progress.n_worse >= patience

    def _card(self) -> dict[str, object]:
        """Return the adapter's card: its purpose, data, settings and losses."""
        config, progress = self._config, self._progress
        shape, schedule = config.shape.settings(), asdict(config.schedule)
        before = "start_validation_loss" if self._start else "base_validation_loss"
        return {
            "name": config.name or config.out.name,
            "description": config.description,
            "examples": list(config.prompts),
            "base": config.base_name,
            "training": {
                "data_sha256": self._data.sha256,
                "n_examples": len(self._data.train),
                "n_validation": len(self._data.validation),
                "n_parameters": self._adapter.n_parameters,
                "shape": shape,
                "schedule": schedule,
                "steps_done": progress.step,
                "best_step": progress.best_step or progress.step,
                "n_tokens": progress.n_tokens,
                "seconds": round(progress.seconds, 1),
                "train_loss": _rounded(progress.train_loss),
                "validation_loss": _rounded(progress.best_loss),
                before: _rounded(progress.base_loss),
                **({} if self._start is None else _provenance_of(self._start)),
            },
        }


def _read(config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> _Data:
    def examples(path: Path) -> list[Example]:
        return [
            tokenise(
                chat,
                tokenizer,
                max_len=config.max_len,
                where=f"{path}, example {i}",
                chat_template=config.chat_template,
                or_else=" or raise --max-len",
            )
            for i, chat in enumerate(read_jsonl(path), 1)
        ]

    train_set = examples(config.data)
    validation: list[Example] = []
    digest = hashlib.sha256(config.data.read_bytes())
    if isinstance(config.validation, Path):
        validation = examples(config.validation)
        digest.update(config.validation.read_bytes())
    elif config.validation > 0:
        chosen = held_out([len(example) for example in train_set], config.validation)
        validation = [train_set[i] for i in sorted(chosen)]
        train_set = [example for i, example in enumerate(train_set) if i not in chosen]
    return _Data(train_set, validation, digest.hexdigest())


def _fingerprint(config: TrainingConfig, data: _Data, start: StartingAdapter | None) -> str:
    """Return a digest of everything that the result of a run depends on."""
    schedule = asdict(config.schedule)
    del schedule["checkpoint_every_s"]
    settings = {
        "format": _FORMAT,
        "chat_template": config.chat_template,
        "data": data.sha256,
        "n_validation": len(data.validation),
        "base": config.base_name,
        "shape": config.shape.settings(),
        "schedule": schedule,
    }
    if start is not None:
        settings["start"] = start.sha256
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _provenance_of(start: StartingAdapter) -> dict[str, object]:
    """Return the part of the card that describes the adapter a run started from."""
    before = {} if start.trained is None else {"before": start.trained}
    return {"start_sha256": start.sha256, **before}


def _engine(config: TrainingConfig) -> TrainingEngine:
    from transformers import AutoModelForCausalLM

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(torch.device(device))
    base = AutoModelForCausalLM.from_pretrained(config.base, dtype=dtype).to(device)
    model = FrozenModel(
        base.config,
        ModelWeights(base),
        dtype=dtype,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return TrainingEngine(model)


def _datum(example: Example, weight: float) -> Datum:
    datum = Datum.of_chat(example.tokens, example.learn)
    return Datum(datum.tokens, datum.targets, datum.weights * weight)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
