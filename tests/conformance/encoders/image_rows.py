"""Image encoders and the adapters of each; transformers and PEFT are the oracle."""

from collections.abc import Callable
from dataclasses import dataclass

import peft
from peft import LoraConfig


@dataclass(frozen=True)
class ImageAdapter:
    """An adapter that PEFT trains at random. ``kind``: the class of transformers that it is for."""

    id: str
    kind: str  # "classifier", "trunk" or "towers"
    config: Callable[[], peft.PeftConfig]


@dataclass(frozen=True)
class ImageRow:
    id: str  # the model type; docs/bases.md names it
    norm: str  # of a layer
    kinds: tuple[str, ...]  # the classes that it is asked as
    linears: tuple[str, ...] = ("fc1", "fc2")
    attention: tuple[str, ...] = ("q_proj", "v_proj")
    beside: tuple[str, ...] = ()  # linears behind the layers
    refused: str | None = None  # as of other rows
    wrong: str | None = None

    def adapters(self) -> list[ImageAdapter]:
        """Return adapters of every kind, whose names say what they are."""
        return [adapter for kind in self.kinds for adapter in self._adapters_of(kind)]

    def _adapters_of(self, kind: str) -> list[ImageAdapter]:
        attention, everything = [*self.attention], [*self.attention, *self.linears, *self.beside]
        head = ["classifier"] if kind == "classifier" else []
        if kind == "trunk":
            config = lambda: LoraConfig(r=4, target_modules=everything)  # noqa: E731
            return [ImageAdapter("trunk-lora", kind, config)]
        return [
            ImageAdapter(
                f"{kind}-lora",
                kind,
                lambda: LoraConfig(r=4, target_modules=everything, modules_to_save=head or None),
            ),
            ImageAdapter(
                f"{kind}-dora",
                kind,
                lambda: LoraConfig(
                    r=4, use_dora=True, target_modules=everything, modules_to_save=head or None
                ),
            ),
            ImageAdapter(
                f"{kind}-rslora-patterns",
                kind,
                lambda: LoraConfig(
                    r=4,
                    use_rslora=True,
                    rank_pattern={r"0\..*q_proj": 2},
                    alpha_pattern={"v_proj": 3},
                    target_modules=attention,
                    modules_to_save=head or None,
                ),
            ),
            ImageAdapter(
                f"{kind}-ia3",
                kind,
                lambda: peft.IA3Config(
                    target_modules=everything,
                    feedforward_modules=["fc2", *self.beside],
                    modules_to_save=head or None,
                ),
            ),
            ImageAdapter(
                f"{kind}-saved",
                kind,
                lambda: LoraConfig(
                    r=3,
                    bias="lora_only",
                    target_modules=attention,
                    modules_to_save=[*head, self.norm],
                ),
            ),
        ]


IMAGE_ROWS = (
    ImageRow("vit", "layernorm_before", ("classifier", "trunk")),
    ImageRow("dinov2", "norm2", ("classifier", "trunk")),
    ImageRow("clip", "layer_norm1", ("towers",), beside=("visual_projection", "text_projection")),
    ImageRow("siglip", "layernorm", ("towers",), beside=("text_model.head",)),
)
