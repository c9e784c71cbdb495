"""The served architectures of image encoders, by model type.

    image → patches → layers → hidden states → pooled → features    → classifier → logits
    text  → tokens  → layers → hidden states → pooled → features    (CLIP and SigLIP)

The features of CLIP and SigLIP are the embedding. Those of ViT and DINOv2 are the inputs of the
classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_server.model.layers.forward_context import ForwardContext

from .encoder import Modality, Tower, TowerInputs

Pool = Callable[[Tensor, Tensor], Tensor]  # hidden states [n, width], token ids [n] → pooled
_NOTHING = nn.Identity()


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The parts of an architecture, by their names in the model."""

    trunks: Mapping[Modality, str]  # the modules whose output has the hidden states
    layers: tuple[str, ...]  # the lists of layers
    towers: Callable[[PreTrainedModel, ForwardContext], Mapping[Modality, Tower]]
    classifier: str = ""  # the linear of the labels
    n_before: int = 1  # rows before those of the patches
    pads_texts: bool = False  # texts are padded to the longest, and padding is read


class ImageTower:
    """The patches of images through a list of layers."""

    classifies_tokens_by_features = False

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        *,
        embeddings: str,
        before: str = "",
        after: str = "",
        pool: Pool,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``before``, ``after``: the norms around the layers. Names are those of modules.

        ``features``: of pooled rows, where an embedding is made of them.
        """
        self._embeddings = model.get_submodule(embeddings)
        self._before = model.get_submodule(before) if before else _NOTHING
        self._after = model.get_submodule(after) if after else _NOTHING
        self._layers = model.get_submodule(layers)
        self._dtype = model.dtype
        self._pool, self._features = pool, features
        self.embeds_features = features is not None

    def forward(self, inputs: TowerInputs) -> Tensor:
        rows = [
            self._embeddings(pixels.to(self._dtype).unsqueeze(0)).squeeze(0)
            for pixels in inputs.images
        ]
        hidden: Tensor = self._before(torch.cat(rows).unsqueeze(0))
        for layer in self._layers:
            hidden = layer(hidden, None)
        hidden = self._after(hidden)
        return hidden.squeeze(0)

    def pooled(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        return self._pool(hidden, token_ids)

    def features(self, pooled: Tensor) -> Tensor:
        return pooled if self._features is None else self._features(pooled)


class TextTower:
    """The texts of a model with two towers."""

    embeds_features = True
    classifies_tokens_by_features = False

    def __init__(
        self, model: PreTrainedModel, step: ForwardContext, *, causal: bool, pool: Pool, head: str
    ) -> None:
        """``head``: the name of the linear that makes an embedding of the pooled row."""
        text = model.get_submodule("text_model")
        self._tokens = text.get_submodule("embeddings.token_embedding")
        self._positions = text.get_submodule("embeddings.position_embedding")
        self._layers = text.get_submodule("encoder.layers")
        self._norm = text.get_submodule("final_layer_norm")
        self._head = model.get_submodule(head)
        self._step, self._causal, self._pool = step, causal, pool

    def forward(self, inputs: TowerInputs) -> Tensor:
        embedded = self._tokens(inputs.token_ids) + self._positions(self._step.positions)
        hidden: Tensor = embedded.unsqueeze(0)
        for layer in self._layers:
            hidden = layer(hidden, None, is_causal=self._causal)
        hidden = self._norm(hidden)
        return hidden.squeeze(0)

    def pooled(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        return self._pool(hidden, token_ids)

    def features(self, pooled: Tensor) -> Tensor:
        features: Tensor = self._head(pooled)
        return features


def _first(hidden: Tensor, token_ids: Tensor) -> Tensor:
    return hidden[0]


def _last(hidden: Tensor, token_ids: Tensor) -> Tensor:
    return hidden[-1]


def _all(hidden: Tensor, token_ids: Tensor) -> Tensor:
    return hidden


def _first_and_mean(hidden: Tensor, token_ids: Tensor) -> Tensor:
    return torch.cat((hidden[0], hidden[1:].mean(0)))


def _end_of_text(eos_token_id: int) -> Pool:
    """Return CLIP's pooling: the row of the first end token.

    Configs of early checkpoints have 2 for the end token, whose id is the highest in fact.
    """

    def pool(hidden: Tensor, token_ids: Tensor) -> Tensor:
        is_end = token_ids if eos_token_id == 2 else token_ids.eq(eos_token_id).int()
        return hidden.index_select(0, is_end.argmax().unsqueeze(0))[0]  # a GPU need not wait

    return pool


def _vit(model: PreTrainedModel, step: ForwardContext) -> Mapping[Modality, Tower]:
    tower = ImageTower(
        model, "vit.layers", embeddings="vit.embeddings", after="vit.layernorm", pool=_first
    )
    return {Modality.IMAGE: tower}


def _dinov2(model: PreTrainedModel, step: ForwardContext) -> Mapping[Modality, Tower]:
    tower = ImageTower(
        model,
        "dinov2.encoder.layer",
        embeddings="dinov2.embeddings",
        after="dinov2.layernorm",
        pool=_first_and_mean,
    )
    return {Modality.IMAGE: tower}


def _clip(model: PreTrainedModel, step: ForwardContext) -> Mapping[Modality, Tower]:
    norm = model.get_submodule("vision_model.post_layernorm")
    projection = model.get_submodule("visual_projection")
    images = ImageTower(
        model,
        "vision_model.encoder.layers",
        embeddings="vision_model.embeddings",
        before="vision_model.pre_layrnorm",
        pool=_first,
        features=nn.Sequential(norm, projection),
    )
    pool = _end_of_text(int(model.config.text_config.eos_token_id))
    texts = TextTower(model, step, causal=True, pool=pool, head="text_projection")
    return {Modality.IMAGE: images, Modality.TEXT: texts}


def _siglip(model: PreTrainedModel, step: ForwardContext) -> Mapping[Modality, Tower]:
    images = ImageTower(
        model,
        "vision_model.encoder.layers",
        embeddings="vision_model.embeddings",
        after="vision_model.post_layernorm",
        pool=_all,
        features=model.get_submodule("vision_model.head"),
    )
    texts = TextTower(model, step, causal=False, pool=_last, head="text_model.head")
    return {Modality.IMAGE: images, Modality.TEXT: texts}


_BOTH = {Modality.IMAGE: "vision_model", Modality.TEXT: "text_model"}
_BOTH_LAYERS = ("vision_model.encoder.layers", "text_model.encoder.layers")

IMAGE_ENCODERS: Mapping[str, ImageLayout] = {
    "vit": ImageLayout({Modality.IMAGE: "vit"}, ("vit.layers",), _vit, "classifier"),
    "dinov2": ImageLayout(
        {Modality.IMAGE: "dinov2"}, ("dinov2.encoder.layer",), _dinov2, "classifier"
    ),
    "clip": ImageLayout(_BOTH, _BOTH_LAYERS, _clip),
    "siglip": ImageLayout(_BOTH, _BOTH_LAYERS, _siglip, n_before=0, pads_texts=True),
}
