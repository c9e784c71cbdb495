"""A frozen CLIP whose linears add the LoRA that learns.

The forward is transformers' own, with a hook at each linear. The engine of language models is not
used: images have no packed batch, and few of them are learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraplex_training.engine.adapter import LearningAdapter
from loraplex_training.engine.segmented_lora import Dropout
from loraplex_training.errors import TrainingError

from .image_folder import read_image

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


class ClipBase:
    """The base and its towers. Only one thread may use it at a time."""

    def __init__(
        self,
        model: CLIPModel,
        processor: Any,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """``processor``: an image processor of transformers."""
        self._model = model.eval().requires_grad_(False)
        self._processor, self._tokenizer = processor, tokenizer
        self._adapter: LearningAdapter | None = None
        self._dropout: Dropout | None = None
        self.linears: dict[str, tuple[int, int]] = {}
        """The linears of both towers: name → (in, out) features."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                self.linears[name] = module.in_features, module.out_features
                module.register_forward_hook(partial(self._add, name))

    @classmethod
    def load(cls, folder: Path, device: str) -> ClipBase:
        """Load the CLIP in ``folder``, in float32. Raises TrainingError for another model."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            model_type = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if model_type != "clip":
                raise TrainingError(
                    f"{folder} is a {model_type}, and classes of images are trained on a CLIP "
                    "alone; name one with --base"
                )
            return cls(
                CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device),
                AutoImageProcessor.from_pretrained(folder, backend="pil"),  # as the server's
                AutoTokenizer.from_pretrained(folder),
            )
        except (OSError, ValueError) as error:
            raise TrainingError(f"the CLIP at {folder} cannot be loaded: {error}") from error

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def weight(self, name: str) -> Tensor:
        """Return a float32 copy of the weight [out, in] of a linear."""
        weight = self._model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.detach().float().clone()

    def pixels(self, files: Sequence[Path]) -> Tensor:
        """Return the inputs float32 [n, channels, height, width] of images on the CPU.

        Raises ExamplesError.
        """
        return torch.cat(
            [
                self._processor(images=read_image(file), return_tensors="pt")["pixel_values"]
                for file in files
            ]
        )

    def tokens(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the inputs of the tower of texts, on the device."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def logits(
        self,
        pixels: Tensor,
        tokens: Mapping[str, Tensor],
        adapter: LearningAdapter | None = None,
        *,
        learning: bool = False,
    ) -> Tensor:
        """Return the scaled cosines [images, texts] through an adapter, or those of the base.

        ``learning``: keep what a backward needs, and apply dropout.
        """
        self._adapter = adapter
        self._dropout = adapter.next_dropout() if adapter is not None and learning else None
        try:
            with torch.set_grad_enabled(learning):
                output = self._model(pixel_values=pixels.to(self.device), **tokens)
        finally:
            self._adapter = None
        logits: Tensor = output.logits_per_image
        return logits

    def _add(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if self._adapter is None or name not in self._adapter.factors:
            return output
        (x,), (a, b) = inputs, self._adapter.factors[name]
        if self._dropout is not None:
            x = x * self._dropout.mask(name, x)
        return output + self._adapter.shape.scale * ((x @ a.t()) @ b.t())
