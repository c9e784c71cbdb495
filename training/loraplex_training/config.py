"""Settings of a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAIN = "lora"  # the recipe of PEFT
RECIPES: Mapping[str, int] = {  # name → the saved rank, in trained ranks
    **dict.fromkeys(("allora", "comp-lora", "flexora", "ggpo", "glad", "inttune"), 1),
    **dict.fromkeys(("lora-pro", "lora-sb", "sora"), 1),
    **dict.fromkeys(("ba-lora", "kasa", "lora-ga"), 2),  # with what was subtracted from the base
}
IMAGE_FAMILIES = ("clip-lora", "comp-lora", "glad", "block-lora")  # of ``images``
FAMILIES = ("lora", "dora", "block-lora", "mixlora", "prefix")
_STORED_DTYPES = ("float16", "bfloat16", "float32")


class ShapeError(ValueError):
    """A value of a shape that is not possible. ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The settings of MixLoRA alone: experts on every MLP, and the loss that balances them."""

    n_experts: int = 8
    top_k: int = 2
    balance: str = "pooled"  # as in the public code; "argmax" as in the paper; "none"
    balance_coefficient: float | None = None  # None = the default of the chosen loss

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise ShapeError("experts", f"top_k is {self.top_k}; it must be in 1…{self.n_experts}")
        if self.balance not in ("pooled", "argmax", "none"):
            raise ShapeError(
                "experts", f"balance is {self.balance!r}; choose pooled, argmax or none"
            )


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The settings of Block-LoRA alone: the number of blocks, and the axis that is cut."""

    n_blocks: int = 4
    axis: str = "rank"  # or "feature"

    def __post_init__(self) -> None:
        if self.n_blocks < 1:
            raise ShapeError("blocks", f"n_blocks is {self.n_blocks}; it must be at least 1")
        if self.axis not in ("rank", "feature"):
            raise ShapeError("blocks", f"axis is {self.axis!r}; choose rank or feature")


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """The settings of prefix tuning alone."""

    n_tokens: int = 16  # virtual tokens

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise ShapeError("prefix", f"n_tokens is {self.n_tokens}; it must be at least 1")


_PARTS: Mapping[str, type] = {
    "experts": ExpertShape,
    "blocks": BlockShape,
    "prefix": PrefixShape,
}


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """The modules and the size of an adapter. Raises ShapeError."""

    family: str = "lora"  # one of ``FAMILIES``
    recipe: str = PLAIN  # or a key of ``RECIPES``, which end as a plain LoRA
    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("all-linear",)  # module names, or "all-linear" alone
    layers: Sequence[int] | None = None  # None = every layer
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0
    stored_dtype: str = "float16"  # of the tensors on disk
    experts: ExpertShape | None = None  # for mixlora
    blocks: BlockShape | None = None  # for block-lora
    prefix: PrefixShape | None = None  # for prefix

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ShapeError("rank", f"rank is {self.rank}; it must be at least 1")
        if not self.targets:
            raise ShapeError(
                "targets", "no target module is named; use 'all-linear' for every linear layer"
            )
        if self.family in IMAGE_FAMILIES and self.family not in FAMILIES:
            raise ShapeError(
                "family", f"family {self.family!r} learns from a folder of images on a CLIP"
            )
        if self.family not in FAMILIES:
            raise ShapeError(
                "family", f"family {self.family!r} cannot be trained; choose {', '.join(FAMILIES)}"
            )
        if self.recipe not in (PLAIN, *RECIPES):
            raise ShapeError(
                "recipe",
                f"recipe is {self.recipe!r}; choose {PLAIN}, {', '.join(sorted(RECIPES))}",
            )
        if self.recipe != PLAIN and (self.family != "lora" or self.dropout or self.layers):
            raise ShapeError(
                "recipe",
                f"recipe {self.recipe!r} trains LoRA without dropout on every layer; "
                "leave out family, dropout and layers",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ShapeError("dropout", f"dropout is {self.dropout}; it must be in [0, 1)")
        self._refuse_unused()
        if self.stored_dtype not in _STORED_DTYPES:
            raise ShapeError(
                "stored_dtype",
                f"stored dtype is {self.stored_dtype!r}; choose {', '.join(_STORED_DTYPES)}",
            )

    def _refuse_unused(self) -> None:
        """Raise ShapeError for options that the family does not have."""
        family = self.family
        if self.experts is not None and family != "mixlora":
            raise ShapeError("experts", f"experts are for family mixlora, not for {family}")
        if self.blocks is not None and family != "block-lora":
            raise ShapeError("blocks", f"blocks are for family block-lora, not for {family}")
        if self.prefix is not None and family != "prefix":
            raise ShapeError("prefix", f"prefix is for family prefix, not for {family}")
        if self.dropout and family in ("dora", "prefix"):
            raise ShapeError("dropout", f"{family} is trained without dropout; leave it out")
        if family not in ("block-lora", "mixlora", "prefix"):
            return
        if self.layers is not None:
            raise ShapeError("layers", f"{family} adapts every layer; leave the layers out")
        if self.rslora:
            raise ShapeError("rslora", f"{family} is scaled by alpha / rank; leave rsLoRA out")
        if family != "block-lora" and tuple(self.targets) != ("all-linear",):
            raise ShapeError("targets", f"{family} chooses its modules; leave the targets out")

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "AdapterShape":
        """Return the shape that ``settings()`` describes."""
        nested = {key: _PARTS[key](**settings[key]) for key in _PARTS.keys() & settings.keys()}
        return cls(**{**settings, **nested})

    def settings(self) -> dict[str, object]:
        """Return the shape as JSON values, without the settings of other families."""
        absent = {name for name in _PARTS if getattr(self, name) is None}
        absent |= {"recipe"} if self.recipe == PLAIN else set()
        return {key: value for key, value in asdict(self).items() if key not in absent}


@dataclass(frozen=True, slots=True)
class Schedule:
    """The length and rate of a run: linear warm-up, then a cosine from ``lr`` to a tenth of it."""

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
    """All settings of a run. ``base_name`` is the base that the adapter's files name."""

    data: Path  # JSONL, one {"messages": [...]} a line
    out: Path
    base: Path  # a transformers directory
    base_name: str
    shape: AdapterShape = AdapterShape()
    schedule: Schedule = Schedule()
    start: Path | None = None  # an adapter of this shape whose weights the run begins with
    validation: Path | float = 0.05  # a JSONL, or the share of the data held out; 0 = none
    max_len: int = 512  # tokens; longer examples are refused
    device: str = "auto"
    threads: int | None = None  # CPU threads; None = torch's default
    gradient_checkpointing: bool = False  # less memory, a third more time; the same gradients
    name: str | None = None  # None = the name of ``out``
    description: str | None = None
    prompts: Sequence[str] = ()  # example prompts for the card
    chat_template: str | None = None  # Jinja, saved with the adapter; None = the base's
