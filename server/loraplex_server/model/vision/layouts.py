"""The served layouts of vision-language models, by model type.

image → tower → projector → embeddings in place of the placeholder tokens → language model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_server.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Sight(Enum):
    """The later tokens that the tokens of a prompt with images see."""

    NONE = "none"  # causal
    IMAGE = "image"  # those of an image see all of the image
    PROMPT = "prompt"  # all see the whole prompt, even beyond a sliding window


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """The parts of an architecture, by their names in transformers' model."""

    parts: tuple[str, ...]  # the tower and the projector
    inputs: tuple[str, ...]  # what the tower reads, by the names of the image processor
    # The tiles of an image of that height and width, whose pixels are [1, n_tiles, 3, h, w]. None:
    # an image is one picture [1, 3, h, w].
    n_tiles: Callable[[PretrainedConfig, tuple[int, int]], int] | None = None
    sight: Sight = Sight.NONE
    # The chat template of checkpoints that have none.
    chat_template: str | None = None


def _one_tile(config: PretrainedConfig, size: tuple[int, int]) -> int:
    return 1  # of an image that is no larger than a tile


def _tiles_of_pinpoints(config: PretrainedConfig, size: tuple[int, int]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    n_tiles: int = image_size_to_num_patches(
        list(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    return n_tiles


_LLAVA = ("model.vision_tower", "model.multi_modal_projector")
_IDEFICS3 = VisionLayout(
    ("model.vision_model", "model.connector"),
    ("pixel_values", "pixel_attention_mask"),
    n_tiles=_one_tile,
)

_QWEN_VL = VisionLayout(("model.visual",), ("pixel_values", "image_grid_thw"))

# It joins the parts of a chat as transformers' processor does: images, <bos>, text, a newline.
_PALIGEMMA_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}{{ bos_token }}"
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
)

VISION_LANGUAGE: Mapping[str, VisionLayout] = {
    "llava": VisionLayout(_LLAVA, ("pixel_values",)),
    "llava_next": VisionLayout(
        _LLAVA, ("pixel_values", "image_sizes"), n_tiles=_tiles_of_pinpoints
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "gemma3": VisionLayout(_LLAVA, ("pixel_values",), sight=Sight.IMAGE),
    "paligemma": VisionLayout(
        _LLAVA, ("pixel_values",), sight=Sight.PROMPT, chat_template=_PALIGEMMA_CHAT
    ),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
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
