"""Train one adapter: a loop that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .batches import IGNORED, Batch, batch_of, endless, grouped
from .checkpoint import Progress
from .config import Schedule, TrainingConfig
from .errors import CheckpointError, ExamplesError, TrainingError
from .examples import Example, read_jsonl, tokenise
from .families import check_start, family_of
from .shared_prefix import logits_at, shared_prefix_len

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StepReport", "TrainedAdapter", "train"]

_WEIGHTS = "adapter_model.safetensors"
_FORMAT = 1  # of the checkpoint; raise it when old ones can no longer be resumed exactly
_CLIP = 1.0  # of the gradient norm
_FINAL_LR = 0.1  # share of the learning rate at the end of the cosine
_SMOOTHING = 0.9  # of the training loss that is shown
_SPARE = 1.5  # times what a last step and a validation took: kept for them


class StepReport(NamedTuple):
    step: int  # steps that are done
    steps: int  # steps in all
    train_loss: float | None
    validation_loss: float | None  # the last one, None before the first
    base_validation_loss: float | None  # before the first step
    tokens_per_s: float
    resumed: bool


class TrainedAdapter(NamedTuple):
    folder: Path
    n_parameters: int
    n_bytes: int  # of adapter_model.safetensors
    progress: Progress
    validation_loss: float | None  # of the weights that were written
    base_validation_loss: float | None  # of the base without the adapter, if the run began there


OnStep = Callable[[StepReport], None]


def train(
    config: TrainingConfig,
    *,
    on_step: OnStep = lambda report: None,
    restart: bool = False,
    overwrite: bool = False,
) -> TrainedAdapter:
    """Train as ``config`` says and write a PEFT directory with a card to ``config.out``.

    An interrupted run (KeyboardInterrupt included) leaves a checkpoint below ``config.out``; the
    same call goes on from it, with the result of an uninterrupted run. On the main thread Ctrl-C
    ends the step, and its validation, first; a second one stops at once and goes on from the last
    checkpoint. ``restart`` ignores the checkpoint, ``overwrite`` replaces a finished adapter.
    Raises TrainingError.
    """
    state = config.out / ".training"
    if restart:
        shutil.rmtree(state, ignore_errors=True)
    if (config.out / "adapter_config.json").exists() and not (overwrite or state.exists()):
        raise CheckpointError(f"{config.out} holds an adapter already; give --overwrite to replace")
    run = _Run(config, state / "checkpoint.safetensors")
    run.resume()
    with _interrupts() as interrupted:

        def told(report: StepReport) -> None:
            """After a step and its validation: only then is the state whole."""
            on_step(report)
            if interrupted.is_set():
                run.checkpoint()
                raise KeyboardInterrupt

        run.loop(told)
    trained = run.export()
    shutil.rmtree(state, ignore_errors=True)
    return trained


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C where that would raise KeyboardInterrupt; a second one does."""
    interrupted = threading.Event()
    default = signal.default_int_handler

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, default)
        interrupted.set()

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not default
    ):
        yield interrupted
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, default)


@dataclass(frozen=True, slots=True)
class _Data:
    train: list[Example]
    validation: list[Example]
    sha256: str


class _Run:
    """One run in memory: the model, the optimiser and where it stands."""

    def __init__(self, config: TrainingConfig, path: Path) -> None:
        most = config.schedule.max_seconds
        self._end = math.inf if most is None else time.monotonic() + most
        from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds

        self._config = config
        self._path = path
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._device = _device(config.device)
        tokenizer = AutoTokenizer.from_pretrained(config.base)
        if not (config.chat_template or tokenizer.chat_template):
            raise TrainingError(f"{config.base} has no chat template; use an instruct model")
        self._pad_id: int = tokenizer.pad_token_id or 0
        self._data = _read(config, tokenizer, self._end)
        self._fingerprint = _fingerprint(config, self._data)
        self._family = family_of(config.shape.family)
        torch.manual_seed(config.schedule.seed)
        # Frozen bfloat16 weights with autocast are the fastest on CPUs with AVX512-BF16 and on
        # GPUs; the adapter's own parameters stay float32.
        base = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.bfloat16)
        self._model = self._family.attach(base.to(self._device), config.shape)
        if config.start is not None:
            check_start(config.start, config.shape)
            self._family.load(self._model, _tensors_of(config.start))
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            list(self._trained.values()),
            lr=config.schedule.lr,
            betas=(0.9, 0.99),
            weight_decay=config.schedule.weight_decay,
        )
        # An auxiliary loss counts the tokens after the shared prefix: those that differ.
        self._n_shared = shared_prefix_len(self._data.train + self._data.validation)
        self._progress = Progress()
        self._best: dict[str, Tensor] = {}
        self._validation_loss: float | None = None
        self._step_s = self._validation_s = 0.0  # that the last one took
        self._resumed = False

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if not self._path.is_file():
            return
        self._progress, tensors = checkpoint.load(self._path, self._fingerprint)
        for name, parameter in self._trained.items():
            parameter.data.copy_(tensors[f"now.{name}"])
            self._optimizer.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            if f"best.{name}" in tensors:
                self._best[name] = tensors[f"best.{name}"]
        self._end -= self._progress.seconds
        self._resumed = True

    def loop(self, on_step: OnStep) -> None:
        schedule, progress = self._config.schedule, self._progress
        lengths = [len(example) for example in self._data.train]
        groups = endless(lengths, schedule.batch_tokens, schedule.seed)
        for _ in range(progress.step):
            next(groups)
        started = saved = time.monotonic()
        before_s, before_tokens = progress.seconds, progress.n_tokens
        if self._data.validation and progress.step == 0:
            self._validate()  # a fresh adapter is the identity: this is the base
        is_late = self._is_late()
        while progress.step < schedule.steps and not self._stalled() and not is_late:
            began = time.monotonic()
            self._step([self._data.train[i] for i in next(groups)])
            now = time.monotonic()
            self._step_s = now - began
            progress.seconds = before_s + now - started
            is_late = self._is_late()
            last = progress.step == schedule.steps or is_late
            if self._data.validation and (progress.step % schedule.validate_every == 0 or last):
                self._validate()
                is_late = self._is_late()
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
                    self._resumed,
                )
            )
        if progress.step == 0:
            raise _out_of_time(self._config)

    def checkpoint(self) -> None:
        if not self._optimizer.state:  # nothing was learnt yet
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            tensors[f"now.{name}"] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        checkpoint.save(self._path, self._fingerprint, self._progress, tensors)

    def export(self) -> TrainedAdapter:
        """Write the best weights (the last ones without validation) and the card."""
        config, out = self._config, self._config.out
        for name, tensor in self._best.items():
            self._trained[name].data.copy_(tensor)
        fresh = out / ".training" / "out"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        self._family.save(self._model, config.shape, config.base_name, fresh)
        if config.chat_template is not None:
            (fresh / "chat_template.jinja").write_text(config.chat_template, encoding="utf-8")
        (fresh / "card.json").write_text(json.dumps(self._card(), indent=2) + "\n")
        for file in sorted(fresh.iterdir(), reverse=True):  # the config, read first, comes last
            file.replace(out / file.name)
        return TrainedAdapter(
            folder=out,
            n_parameters=sum(p.numel() for p in self._trained.values()),
            n_bytes=(out / _WEIGHTS).stat().st_size,
            progress=self._progress,
            validation_loss=self._progress.best_loss,
            base_validation_loss=None if config.start else self._progress.base_loss,
        )

    def _step(self, examples: list[Example]) -> None:
        schedule, progress = self._config.schedule, self._progress
        torch.manual_seed(schedule.seed * 1_000_003 + progress.step)  # dropout, resumable
        self._model.train()
        batch = batch_of(examples, self._pad_id, self._device)
        loss = self._loss(batch)
        total = loss
        if self._family.extra_loss is not None:
            total = loss + self._family.extra_loss(self._model)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._trained.values(), _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.lr * _lr_share(progress.step, schedule)
        self._optimizer.step()
        self._optimizer.zero_grad()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {progress.step}; lower the learning rate"
            )
        old = progress.train_loss
        progress.train_loss = value if old is None else _SMOOTHING * old + (1 - _SMOOTHING) * value
        progress.step += 1
        progress.n_tokens += int(batch.mask.sum())

    @torch.no_grad()
    def _validate(self) -> None:
        """Without effect where the run's time ends meanwhile.

        The first one of trained weights goes on: it decides whether there is anything to save, and
        that of the base was in time.
        """
        began = time.monotonic()
        self._model.eval()
        examples, progress = self._data.validation, self._progress
        groups = grouped([len(e) for e in examples], self._config.schedule.batch_tokens)
        total, n = 0.0, 0
        for group in groups:
            if time.monotonic() > self._end and (progress.step == 0 or self._best):
                return
            batch = batch_of([examples[i] for i in group], self._pad_id, self._device)
            count = int((batch.labels != IGNORED).sum())
            total += float(self._loss(batch)) * count
            n += count
        self._validation_s = time.monotonic() - began
        self._validation_loss = total / n
        if progress.step == 0:
            progress.base_loss = self._validation_loss
        elif progress.best_loss is None or self._validation_loss < progress.best_loss:
            progress.best_loss, progress.best_step = self._validation_loss, progress.step
            progress.n_worse = 0
            self._best = {n: p.detach().clone() for n, p in self._trained.items()}
        else:
            progress.n_worse += 1

    def _loss(self, batch: Batch) -> Tensor:
        """Mean over the tokens to learn; the head runs only at positions that predict one."""
        wanted = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
        with _autocast(self._device):
            logits = logits_at(self._model, batch, wanted, self._n_shared)
        logits = logits.float().flatten(0, 1)
        labels = batch.labels[:, wanted].flatten()
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)

    def _stalled(self) -> bool:
        patience = self._config.schedule.patience
        return patience is not None and self._progress.n_worse >= patience

    def _is_late(self) -> bool:
        """Whether the time left may be too short for another step and its validation."""
        return time.monotonic() + _SPARE * (self._step_s + self._validation_s) >= self._end

    def _card(self) -> dict[str, object]:
        """What a person wants to know about the adapter later."""
        config, progress = self._config, self._progress
        shape, schedule = config.shape.settings(), _settings(config.schedule)
        before = "base_validation_loss" if config.start is None else "start_validation_loss"
        return {
            "name": config.name or config.out.name,
            "description": config.description,
            "examples": list(config.prompts),
            "base": config.base_name,
            "training": {
                "data_sha256": self._data.sha256,
                "n_examples": len(self._data.train),
                "n_validation": len(self._data.validation),
                "n_parameters": sum(p.numel() for p in self._trained.values()),
                "shape": shape,
                "schedule": schedule,
                "steps_done": progress.step,
                "best_step": progress.best_step or progress.step,
                "n_tokens": progress.n_tokens,
                "seconds": round(progress.seconds, 1),
                "train_loss": _rounded(progress.train_loss),
                "validation_loss": _rounded(progress.best_loss),
                before: _rounded(progress.base_loss),
                **({} if config.start is None else _told_of(config.start)),
            },
        }


def _read(config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, end: float) -> _Data:
    """``end``: of ``time.monotonic``. Raises TrainingError then."""

    def examples(path: Path) -> list[Example]:
        read = []
        for i, chat in enumerate(read_jsonl(path), 1):
            if time.monotonic() > end:
                raise _out_of_time(config)
            example = tokenise(
                chat,
                tokenizer,
                max_len=config.max_len,
                where=f"{path}, example {i}",
                chat_template=config.chat_template,
            )
            read.append(example)
        return read

    train_set = examples(config.data)
    held_out: list[Example] = []
    digest = hashlib.sha256(config.data.read_bytes())
    if isinstance(config.validation, Path):
        held_out = examples(config.validation)
        digest.update(config.validation.read_bytes())
    elif config.validation > 0:
        chosen = _held_out(train_set, config.validation, config)
        held_out = [train_set[i] for i in sorted(chosen)]
        train_set = [example for i, example in enumerate(train_set) if i not in chosen]
    return _Data(train_set, held_out, digest.hexdigest())


def _held_out(examples: list[Example], share: float, config: TrainingConfig) -> set[int]:
    """Spread over the file, the same ones each time; the seed draws those that fit the limit."""
    n = max(1, round(len(examples) * share))
    if n >= len(examples):
        raise ExamplesError(f"{config.data} has {len(examples)} examples: too few to hold out")
    every = len(examples) / n
    chosen = [int(i * every) for i in range(n)]
    if config.max_validation_tokens is not None:
        random.Random(config.schedule.seed).shuffle(chosen)
        totals = accumulate(len(examples[i]) for i in chosen)
        n_fit = sum(total <= config.max_validation_tokens for total in totals)
        chosen = chosen[: max(1, n_fit)]
    return set(chosen)


def _out_of_time(config: TrainingConfig) -> TrainingError:
    return TrainingError(
        f"{config.schedule.max_seconds:g} seconds were over before the first step: loading the "
        "base, reading the examples and validating the base take longer; raise budget_s"
    )


def _fingerprint(config: TrainingConfig, data: _Data) -> str:
    """Of everything that the course of a run depends on."""
    schedule = _settings(config.schedule)
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
    if config.start is not None:
        settings["start"] = _digest_of(config.start)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(schedule: Schedule) -> dict[str, object]:
    """JSON-ready; the limit of time only where there is one."""
    return {k: v for k, v in asdict(schedule).items() if k != "max_seconds" or v is not None}


def _tensors_of(adapter: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(_weights_of(adapter))
    except SafetensorError as error:
        raise TrainingError(f"cannot start from {adapter}: {error}") from error
    return tensors


def _digest_of(adapter: Path) -> str:
    return hashlib.sha256(_weights_of(adapter)).hexdigest()


def _told_of(adapter: Path) -> dict[str, object]:
    """For the card of a run that went on from ``adapter``."""
    told: dict[str, object] = {"start_sha256": _digest_of(adapter)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # trained elsewhere
        told["before"] = json.loads((adapter / "card.json").read_text())["training"]
    return told


def _weights_of(adapter: Path) -> bytes:
    try:
        return (adapter / _WEIGHTS).read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot start from {adapter}: {error.strerror}") from error


def _lr_share(step: int, schedule: Schedule) -> float:
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    rest = max(1, schedule.steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - schedule.warmup_steps) / rest))
    return _FINAL_LR + (1 - _FINAL_LR) * cosine


def _device(spec: str) -> str:
    if spec == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return spec


@contextlib.contextmanager
def _autocast(device: str) -> Iterator[None]:
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        yield


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
