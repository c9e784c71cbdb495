"""Settings of a run that learns classes of images."""

from dataclasses import dataclass, field
from pathlib import Path

from loraplex_training.config import IMAGE_FAMILIES, BlockShape, ShapeError
from loraplex_training.errors import TrainingError

BLOCK_LORA = "block-lora"
_ATTENTION = ("q_proj", "k_proj", "v_proj")
TEMPLATE = "a photo of a {}."
_PLACE = "{}"  # of the label in a template


@dataclass(frozen=True, slots=True)
class ImageShape:
    """The method, and the size of its LoRA. Raises ShapeError."""

    family: str = "clip-lora"  # one of ``IMAGE_FAMILIES``
    rank: int = 2
    alpha: float = 1.0  # the update is scaled by alpha / √rank
    targets: tuple[str, ...] = _ATTENTION  # ends of module names, in both towers
    dropout: float = 0.25
    blocks: BlockShape | None = None  # for block-lora
    stored_dtype: str = "float16"  # of the tensors on disk

    def __post_init__(self) -> None:
        if self.family not in IMAGE_FAMILIES:
            raise ShapeError(
                "family",
                f"family {self.family!r} does not learn from images; choose "
                f"{', '.join(IMAGE_FAMILIES)}",
            )
        if self.blocks is not None and self.family != BLOCK_LORA:
            raise ShapeError("blocks", f"blocks are for family block-lora, not for {self.family}")
        if not 0.0 <= self.dropout < 1.0:
            raise ShapeError("dropout", f"dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True, slots=True)
class ImageTraining:
    """All settings of a run. ``base_name`` is the base that the adapter's files name."""

    data: Path  # a folder for each class
    out: Path
    base: Path  # a CLIP, as transformers saves it
    base_name: str
    shape: ImageShape = field(default_factory=ImageShape)
    validation: Path | None = None  # a folder like ``data``, of other images
    template: str = TEMPLATE
    steps: int = 300
    lr: float = 1e-3
    batch_images: int = 32
    seed: int = 0
    device: str = "auto"
    threads: int | None = None  # CPU threads; None = torch's default
    name: str | None = None  # None = the name of ``out``
    description: str | None = None

    def __post_init__(self) -> None:
        if self.template.count(_PLACE) != 1:
            raise TrainingError(
                f"the template {self.template!r} needs one {_PLACE} in place of the label"
            )

    def prompt(self, label: str) -> str:
        """Return the text of a class that images are compared with."""
        return self.template.replace(_PLACE, label)
