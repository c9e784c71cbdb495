"""Frozen image encoders, alone (ViT, DINOv2) or beside an encoder of texts (CLIP, SigLIP)."""

import dataclasses
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import HeadPlan
from loraplex_server.model.layers.adapted_modules import replace_embeddings, replace_norms
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.loading.served_spec import PackedSlice, served_spec
from loraplex_server.model.packing import replace_linears

from .encoder import Encoder, Modality, TowerInputs
from .image_layouts import IMAGE_ENCODERS
from .text_attention import install_text_attention
from .tower_check import TowerReference


class Similarity(NamedTuple):
    """The fit of an image and a text: ``scale · cos(image, text) + bias``."""

    scale: float
    bias: float
    sums_to_one: bool  # the probabilities of the labels of an image, as CLIP's and not SigLIP's


class ImageEncoder(Encoder):
    """An encoder of images, with adapters on its linears and norms."""

    def __init__(
        self,
        model: PreTrainedModel,
        model_id: str,
        *,
        image_size: tuple[int, int],
        head: HeadPlan | None = None,
        self_check: bool = True,
    ) -> None:
        """Takes over transformers' model: an image classifier, or one with two towers.

        ``image_size``: height and width as the image processor makes them. ``head``: the
        checkpoint's own classifier, if it is one. Raises UnsupportedBase if the states differ from
        those of transformers.
        """
        config = model.config
        layout = self.layout = IMAGE_ENCODERS[config.model_type]
        self.head_plan, self.lacking = head, frozenset()
        self.step = ForwardContext()
        self.dtype, self.device = model.dtype, model.device
        self.image_size = image_size
        self._patch_size = int(getattr(config, "vision_config", config).patch_size)
        if layout.classifier:
            model.set_submodule(layout.classifier, nn.Identity())
        self.similarity = None if layout.classifier else _similarity(model)
        reference = TowerReference.capture(model, layout, image_size) if self_check else None
        packed: dict[str, PackedSlice] = {}
        spec = _spec_of(model, model_id)
        self.spec = served_spec(spec, model, packed, linears=spec.modules)
        install_text_attention(model, self.step)
        self.groups = replace_linears(model, self.spec, self.step, packed, exponent_coding=True)
        self.norms = replace_norms(model, self.step)
        self.embeddings = replace_embeddings(model, self.step, within=("text_model.",))
        self.towers = layout.towers(model, self.step)
        texts = getattr(config, "text_config", None)
        self.max_text_tokens = 0 if texts is None else int(texts.max_position_embeddings)
        self.max_positions = max(self.n_rows(*image_size), self.max_text_tokens)
        if reference is not None:
            reference.check(self)

    def n_rows(self, height: int, width: int) -> int:
        """Return the rows of an image of this size."""
        n_patches = (height // self._patch_size) * (width // self._patch_size)
        return n_patches + self.layout.n_before

    def probe_inputs(self) -> tuple[Modality, TowerInputs]:
        blank = torch.zeros(3, *self.image_size, dtype=self.dtype, device=self.device)
        no_ids = torch.zeros(self.n_rows(*self.image_size), dtype=torch.int64, device=self.device)
        return Modality.IMAGE, TowerInputs(no_ids, no_ids, (blank,))


def _similarity(model: PreTrainedModel) -> Similarity:
    scale = float(model.get_parameter("logit_scale").detach().exp())
    bias = getattr(model, "logit_bias", None)
    added = 0.0 if bias is None else float(bias.detach())
    return Similarity(scale, added, sums_to_one=bias is None)


def _spec_of(model: PreTrainedModel, model_id: str) -> BaseSpec:
    """Return the spec of a model without its classifier.

    The output linear of ``nn.MultiheadAttention`` is left out: PyTorch reads its weight and does
    not call it, and PEFT's adapters have no effect on it either.
    """
    config = model.config
    spec = BaseSpec.of(model, model_id)
    called = {
        name: shape
        for name, shape in spec.modules.items()
        if not isinstance(model.get_submodule(name), NonDynamicallyQuantizableLinear)
    }
    width = int(getattr(config, "vision_config", config).hidden_size)
    layout = IMAGE_ENCODERS[config.model_type]
    return dataclasses.replace(
        spec,
        model_type=str(config.model_type),
        modules=MappingProxyType(called),
        classifier=layout.classifier,
        feature_size=_feature_size(model, width),
    )


def _feature_size(model: PreTrainedModel, width: int) -> int:
    match model.config.model_type:
        case "dinov2":
            return 2 * width
        case "clip":
            return int(model.config.projection_dim)
        case _:
            return width
