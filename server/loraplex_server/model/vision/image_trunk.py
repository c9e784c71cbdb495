"""The tower and the projector of a vision-language model, whose modules apply adapters.

    capture   runs a made image through transformers' modules, and notes which linears it calls
    install   replaces these linears and the norms, as in the decoder
    check     compares the features of the made image with those of transformers

An image runs alone, with one adapter. All rows of the tower and of the projector are its rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.layers.adapted_modules import AdaptedNorm, RmsNorm
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.layers.packed_lora_linear import LoraLinear
from loraplex_server.model.rounding import differences, disturbed, rms, rounding_of, tolerance_of

from .layouts import VISION_LANGUAGE, VisionLayout

BindRows = Callable[[int], None]  # binds the adapter of an image to that number of rows
_ADAPTED = (LoraLinear, AdaptedNorm, RmsNorm)


@dataclass(frozen=True, slots=True)
class ImageReference:
    """The features of a made image by transformers' own modules."""

    linears: frozenset[str]  # that an image's features depend on
    inputs: Mapping[str, Tensor]
    features: Tensor  # [n_tokens, hidden_size]
    tolerance: float

    @staticmethod
    def capture(model: PreTrainedModel, layout: VisionLayout) -> ImageReference:
        """Run the loaded model, which must be unchanged, and leave it unchanged.

        Raises UnsupportedBase if the tower does not run.
        """
        inputs = _made_image(model, layout)
        layers = [
            name
            for name, _ in model.named_modules()
            if name.startswith(layout.parts) and _is_layer(model, name)
        ]
        rounding = rounding_of(model.dtype)
        called: set[str] = set()
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.startswith(layout.parts):
                    stack.callback(module.register_forward_hook(_noting(called, name)).remove)
            stack.enter_context(disturbed(model, layers, rounding))
            twice = {name: torch.cat((value, value)) for name, value in inputs.items()}
            try:
                clean, moved = _features_of(model, twice)
            except Exception as error:
                raise UnsupportedBase(f"its tower does not run on an image: {error}") from error
        tolerance = tolerance_of(moved, clean, rounding)
        return ImageReference(frozenset(called), inputs, clean, tolerance)


class ImageTrunk:
    """Computes the features of images. Engine thread only after the build."""

    def __init__(
        self, model: PreTrainedModel, step: ForwardContext, reference: ImageReference
    ) -> None:
        """``step``: read by the replaced modules of ``model``, which this object refills."""
        self.layout = VISION_LANGUAGE[model.config.model_type]
        self.step = step
        self.image_token_id = int(model.config.image_token_id)
        self._model, self._reference = model, reference
        self._bind: BindRows = _no_adapter
        self._n_rows = -1
        for name, module in model.named_modules():
            if name.startswith(self.layout.parts) and isinstance(module, _ADAPTED):
                module.register_forward_pre_hook(self._before)

    def features(self, inputs: Mapping[str, Tensor], bind: BindRows | None = None) -> Tensor:
        """Return the embeddings [n_tokens, hidden_size] of one image.

        ``inputs``: by the names of the layout, on any device. ``bind`` is called on the way with
        each number of rows, and sets segments and fallback of ``step``; None: the base alone.
        """
        model = self._model
        moved = {name: _to(inputs[name], model) for name in self.layout.inputs if name in inputs}
        self._bind, self._n_rows = bind or _no_adapter, -1
        self.step.clear_adapters()
        try:
            (features,) = _features_of(model, moved)
        finally:
            self._bind = _no_adapter
            self.step.clear_adapters()
        return features

    def check(self) -> None:
        """Raises UnsupportedBase if the features differ from those of transformers."""
        expected = self._reference
        with torch.inference_mode():
            off = rms(differences(self.features(expected.inputs), expected.features))
        if off > expected.tolerance:
            raise UnsupportedBase(
                "its tower answers differently from transformers: the features of an image differ "
                f"by {off:.2g} of their size, and rounding explains {expected.tolerance:.2g}. "
                "--no-self-check serves it nevertheless"
            )

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Bind the adapter to the rows of a module that begins, whose input becomes contiguous."""
        n_rows = inputs[0].shape[:-1].numel()
        if n_rows != self._n_rows:
            self._n_rows = n_rows
            self.step.positions = torch.zeros(n_rows, dtype=torch.int64)
            self._bind(n_rows)
        return (inputs[0].contiguous(), *inputs[1:])


def _made_image(model: PreTrainedModel, layout: VisionLayout) -> dict[str, Tensor]:
    """Return the inputs of the tower for a square image of random pixels."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if "image_grid_thw" in layout.inputs:
        return _made_patches(model, generator)
    size = int(config.vision_config.image_size)
    n_tiles = layout.n_tiles(config, (size, size)) if layout.n_tiles is not None else 1
    pixels = torch.randn(n_tiles, 3, size, size, generator=generator)
    inputs = {"pixel_values": pixels if layout.n_tiles is None else pixels.unsqueeze(0)}
    if "image_sizes" in layout.inputs:
        inputs["image_sizes"] = torch.tensor([[size, size]])
    return {name: _to(value, model) for name, value in inputs.items()}


def _made_patches(model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the patches of an image with twice as many columns as rows."""
    vision = model.config.vision_config
    n_rows = 4 * int(vision.spatial_merge_size)
    width = int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    pixels = torch.randn(2 * n_rows**2, width, generator=generator)
    grid = torch.tensor([[1, n_rows, 2 * n_rows]])
    return {"pixel_values": _to(pixels, model), "image_grid_thw": _to(grid, model)}


def _features_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the embeddings [n_tokens, hidden_size] of each image."""
    output = model.model.get_image_features(**inputs)
    return list(output.pooler_output)


def _to(value: Tensor, model: PreTrainedModel) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _no_adapter(n_rows: int) -> None:
    """Leaves all rows to the base."""


def _is_layer(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf.isdecimal() and isinstance(model.get_submodule(parent), nn.ModuleList)


def _noting(called: set[str], name: str) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _module, _inputs, _output: called.add(name)
