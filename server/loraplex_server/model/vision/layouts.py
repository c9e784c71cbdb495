"""The served layouts of vision-language models, by model type.

image → tower → projector → embeddings in place of the placeholder tokens → language model
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_server.model.errors import ModelError


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """The parts of an architecture, by their names in transformers' model."""

    parts: tuple[str, ...]  # the tower and the projector
    inputs: tuple[str, ...]  # what the tower reads, by the names of the image processor
    has_tiles: bool = False  # an image is several pictures: pixel values [1, n_tiles, 3, h, w]


_IDEFICS3 = VisionLayout(
    ("model.vision_model", "model.connector"),
    ("pixel_values", "pixel_attention_mask"),
    has_tiles=True,
)

VISION_LANGUAGE: Mapping[str, VisionLayout] = {
    "llava": VisionLayout(("model.vision_tower", "model.multi_modal_projector"), ("pixel_values",)),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
}


def layout_of(path: Path) -> VisionLayout | None:
    """Return the layout of the model in ``path``; None for other models. Raises ModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    return VISION_LANGUAGE.get(config.model_type)


def auto_class(path: Path) -> Any:
    """Return transformers' class that loads the model in ``path``. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if layout_of(path) is None else AutoModelForImageTextToText
