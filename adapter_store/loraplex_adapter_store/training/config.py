"""What a training run is told once, at start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["AdapterShape", "Schedule", "TrainingConfig"]

_STORED_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Where the adapter sits and how large it is; ``family`` is a row of ``families.FAMILIES``."""

    family: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("all-linear",)  # module names, or "all-linear" alone
    layers: Sequence[int] | None = None  # None = every layer
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0
    stored_dtype: str = "float16"  # of the tensors on disk

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if not self.targets:
            raise ValueError("no target module is named; use 'all-linear' for every linear layer")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.stored_dtype not in _STORED_DTYPES:
            raise ValueError(
                f"stored dtype is {self.stored_dtype!r}; choose {', '.join(_STORED_DTYPES)}"
            )


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast. Cosine from ``lr`` down to a tenth of it, after a linear warm-up."""

    steps: int = 300
    lr: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.0
    batch_tokens: int = 1024  # padded tokens of one step
    validate_every: int = 50  # steps
    patience: int | None = None  # validations without improvement before an early stop
    checkpoint_every_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One run. ``base_name`` is written into the adapter as the base it belongs to."""

    data: Path  # JSONL, one {"messages": [...]} a line
    out: Path
    base: Path  # a transformers directory
    base_name: str
    shape: AdapterShape = AdapterShape()
    schedule: Schedule = Schedule()
    validation: Path | float = 0.05  # a JSONL, or the share of the data held out; 0 = none
    max_len: int = 512  # tokens; longer examples are refused
    device: str = "auto"
    threads: int | None = None  # CPU threads; None = torch's default
    name: str | None = None  # None = the name of ``out``
    description: str | None = None
    prompts: Sequence[str] = ()  # example prompts for the card
