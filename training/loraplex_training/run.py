"""The state of one training run in memory: data, model, optimiser and progress."""

from __future__ import annotations

import contextlib
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
from torch import Tensor, nn

from . import checkpoint
from .batches import IGNORED, Batch, batch_of, endless, grouped
from .checkpoint import Progress
from .config import TrainingConfig
from .engine.dtype import compute_dtype
from .errors import TrainingError
from .examples import Example, held_out, read_jsonl, tokenise
from .families import check_start, family_of
from .schedule import rate_share
from .shared_prefix import logits_at, shared_prefix_len

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = "adapter_model.safetensors"
_FORMAT = 1  # of the checkpoint; raise it when old checkpoints cannot be resumed exactly
_CLIP = 1.0  # of the gradient norm
_SMOOTHING = 0.9  # of the training loss that is shown


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
    """The state of a run in memory: model, optimiser and progress.

    A subclass may learn otherwise: the methods from ``_attach`` to ``_save`` are its hooks.
    """

    def __init__(self, config: TrainingConfig, path: Path) -> None:
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
        self._data = _read(config, tokenizer)
        self._fingerprint = _fingerprint(config, self._data)
        torch.manual_seed(config.schedule.seed)
        # Frozen bfloat16 weights with autocast are the fastest on CPUs with AVX512-BF16 and on
        # GPUs; the adapter's own parameters stay float32.
        dtype = compute_dtype(torch.device(self._device))
        base = AutoModelForCausalLM.from_pretrained(config.base, dtype=dtype)
        self._trained: dict[str, Tensor] = {}
        self._attach(base.to(self._device))
        self._progress = Progress()
        self._best: dict[str, Tensor] = {}
        self._validation_loss: float | None = None

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        if not self._path.is_file():
            return
        self._progress, tensors = checkpoint.load(self._path, self._fingerprint)
        self._load_state(tensors)
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
            self._validate()  # a fresh adapter changes nothing, so this scores the base
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
        tensors = self._state() | {f"best.{name}": tensor for name, tensor in self._best.items()}
        checkpoint.save(self._path, self._fingerprint, self._progress, tensors)

    def export(self) -> TrainedAdapter:
        """Write the card and the best weights; without validation, the last weights."""
        config, out = self._config, self._config.out
        if self._best:
            self._set_weights(self._best)
        fresh = out / ".training" / "out"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        self._save(fresh)
        if config.chat_template is not None:
            (fresh / "chat_template.jinja").write_text(config.chat_template, encoding="utf-8")
        (fresh / "card.json").write_text(json.dumps(self._card(), indent=2) + "\n")
        # Readers look for adapter_config.json, so it comes last.
        for file in sorted(fresh.iterdir(), reverse=True):
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
        share = rate_share(progress.step, schedule.steps, schedule.warmup_steps)
        value, n_tokens = self._learn(examples, schedule.lr * share)
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {progress.step}; lower the learning rate"
            )
        old = progress.train_loss
        progress.train_loss = value if old is None else _SMOOTHING * old + (1 - _SMOOTHING) * value
        progress.step += 1
        progress.n_tokens += n_tokens

    @torch.no_grad()
    def _validate(self) -> None:
        """Validate, and record the loss and the best weights."""
        examples, progress = self._data.validation, self._progress
        groups = grouped([len(e) for e in examples], self._config.schedule.batch_tokens)
        total, n = 0.0, 0
        for group in groups:
            loss, count = self._score([examples[i] for i in group])
            total += loss
            n += count
        self._validation_loss = total / n
        if progress.step == 0:
            progress.base_loss = self._validation_loss
        elif progress.best_loss is None or self._validation_loss < progress.best_loss:
            progress.best_loss, progress.best_step = self._validation_loss, progress.step
            progress.n_worse = 0
            self._best = self._weights()
        else:
            progress.n_worse += 1

    def _attach(self, base: PreTrainedModel) -> None:
        config = self._config
        self._family = family_of(config.shape.family)
        self._model = self._family.attach(base, config.shape)
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
        # An auxiliary loss counts only the tokens after the shared prefix.
        self._n_shared = shared_prefix_len(self._data.train + self._data.validation)

    def _learn(self, examples: list[Example], lr: float) -> tuple[float, int]:
        """Do a step, and return the mean loss before it and the number of tokens."""
        schedule = self._config.schedule
        torch.manual_seed(schedule.seed * 1_000_003 + self._progress.step)  # dropout, resumable
        self._model.train()
        batch = batch_of(examples, self._pad_id, self._device)
        loss = self._loss(batch)
        total = loss
        if self._family.extra_loss is not None:
            total = loss + self._family.extra_loss(self._model)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._trained.values(), _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()), int(batch.mask.sum())

    def _score(self, examples: list[Example]) -> tuple[float, int]:
        """Return the summed loss and the tokens to learn; before the first step, the base's."""
        self._model.eval()
        batch = batch_of(examples, self._pad_id, self._device)
        n = int((batch.labels != IGNORED).sum())
        return float(self._loss(batch)) * n, n

    def _loss(self, batch: Batch) -> Tensor:
        """Return the mean loss over the tokens to learn; the head runs at their positions only."""
        positions = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
        narrow = compute_dtype(torch.device(self._device)) is torch.bfloat16
        with torch.autocast(self._device.partition(":")[0], torch.bfloat16, enabled=narrow):
            logits = logits_at(self._model, batch, positions, self._n_shared)
        logits = logits.float().flatten(0, 1)
        labels = batch.labels[:, positions].flatten()
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)

    def _weights(self) -> dict[str, Tensor]:
        """Return copies of all that is saved."""
        return {n: p.detach().clone() for n, p in self._trained.items()}

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            self._trained[name].data.copy_(tensor)

    def _state(self) -> dict[str, Tensor]:
        """Return the weights and the optimiser's state."""
        tensors = {f"now.{name}": parameter.detach() for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.data.copy_(tensors[f"now.{name}"])
            self._optimizer.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def _save(self, folder: Path) -> None:
        self._family.save(self._model, self._config.shape, self._config.base_name, folder)

    def _stalled(self) -> bool:
        patience = self._config.schedule.patience
        return patience is not None and self._progress.n_worse >= patience

    def _card(self) -> dict[str, object]:
        """Return the adapter's card: its purpose, data, settings and losses."""
        config, progress = self._config, self._progress
        shape, schedule = config.shape.settings(), asdict(config.schedule)
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
                **({} if config.start is None else _provenance_of(config.start)),
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


def _fingerprint(config: TrainingConfig, data: _Data) -> str:
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
    if config.start is not None:
        settings["start"] = _digest_of(config.start)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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


def _provenance_of(adapter: Path) -> dict[str, object]:
    """Return the part of the card that describes the adapter a run started from."""
    provenance: dict[str, object] = {"start_sha256": _digest_of(adapter)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # trained elsewhere
        provenance["before"] = json.loads((adapter / "card.json").read_text())["training"]
    return provenance


def _weights_of(adapter: Path) -> bytes:
    try:
        return (adapter / _WEIGHTS).read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot start from {adapter}: {error.strerror}") from error


def _device(spec: str) -> str:
    if spec == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return spec


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
