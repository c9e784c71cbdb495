"""Tiny vision-language bases, each served as transformers computes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionRow:
    id: str  # docs/bases.md names it; a layout of ``save_tiny_vision``
    trunk: str  # the name of the language model
    projector: str
    # Parts of names in adapters → what they were with transformers 4.
    earlier_names: tuple[tuple[str, str], ...] = ()
    nightly: bool = False  # a layout that differs little from another one
    saves_projector: bool = True  # False: its projection is no linear
    refused: str | None = None
    wrong: str | None = None


_LLAVA_4 = (
    ("model.model.language_model.", "model.language_model.model."),
    ("model.model.vision_tower.", "model.vision_tower.vision_model."),
    ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
)
_QWEN_4 = (
    ("model.model.language_model.", "model.model."),
    ("model.model.visual.", "model.visual."),
)

VISION_ROWS = (
    VisionRow("llava", "language_model", "multi_modal_projector", _LLAVA_4),
    VisionRow("llava_next", "language_model", "multi_modal_projector"),
    VisionRow("smolvlm", "text_model", "connector", nightly=True),
    VisionRow("idefics3", "text_model", "connector"),
    VisionRow("gemma3", "language_model", "multi_modal_projector", _LLAVA_4, saves_projector=False),
    VisionRow("paligemma", "language_model", "multi_modal_projector", _LLAVA_4),
    VisionRow("qwen2_vl", "language_model", "merger", nightly=True),
    VisionRow("qwen2_5_vl", "language_model", "merger", _QWEN_4),
)
