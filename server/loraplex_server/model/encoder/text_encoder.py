"""A frozen text encoder: a transformers model whose attention, linears and norms are replaced."""

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import HeadPlan, PoolingMode
from loraplex_server.model.layers.adapted_modules import replace_embeddings, replace_norms
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.loading.served_spec import PackedSlice, served_spec
from loraplex_server.model.packing import replace_linears

from .encoder import Encoder, Modality, TowerInputs
from .encoder_check import EncoderReference
from .layouts import ENCODERS
from .text_attention import install_text_attention


class TextEncoder(Encoder):
    """An encoder of texts, whose only tower is the encoder itself.

    ``forward`` reads rows and adapters from ``step``.
    """

    embeds_features = False

    def __init__(
        self,
        model: PreTrainedModel,
        model_id: str,
        *,
        head: HeadPlan | None = None,
        lacking: frozenset[str] = frozenset(),
        self_check: bool = True,
    ) -> None:
        """Takes over transformers' sequence classifier ``model``.

        ``head``: the checkpoint's own classifier, if it is one. ``lacking``: modules of the
        features that the checkpoint does not have. Raises UnsupportedBase if the states differ from
        those of transformers.
        """
        config = model.config
        self.head_plan, self.lacking = head, lacking
        self.layout = ENCODERS[config.model_type]
        self.classifies_tokens_by_features = self.layout.classifies_tokens_by_features
        self.towers = {Modality.TEXT: self}
        self.step = ForwardContext()
        self.dtype, self.device = model.dtype, model.device
        self.classifier_pooling = PoolingMode(getattr(config, "classifier_pooling", "cls"))
        self._pad = int(config.pad_token_id or 0) if self.layout.counts_from_pad else None
        n_before = 0 if self._pad is None else self._pad + 1
        self.max_positions = int(config.max_position_embeddings) - n_before
        model.set_submodule(self.layout.classifier, nn.Identity())
        reference = EncoderReference.capture(model, self.max_positions) if self_check else None
        packed: dict[str, PackedSlice] = {}
        spec = _spec_of(model, model_id)
        self.spec = served_spec(spec, model, packed, linears=spec.modules)
        install_text_attention(model, self.step)
        self.groups = replace_linears(model, self.spec, self.step, packed, exponent_coding=True)
        self.norms = replace_norms(model, self.step)  # names
        self.embeddings = replace_embeddings(model, self.step)  # names
        self._embedding = model.get_input_embeddings()
        self._trunk = model.get_submodule(self.layout.trunk)
        self._features = self.layout.features(model)
        if hasattr(self._trunk, "pooler"):
            self._trunk.pooler = None  # ``features`` runs it, on pooled rows alone
        if reference is not None:
            reference.check(self)

    def probe_inputs(self) -> tuple[Modality, TowerInputs]:
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Modality.TEXT, TowerInputs(zero, zero)

    def forward(self, inputs: TowerInputs) -> Tensor:
        """Return the final hidden states [T, hidden_size]."""
        token_ids = inputs.token_ids
        arguments = {
            "inputs_embeds": self._embedding(token_ids).unsqueeze(0),
            "position_ids": self._position_ids(token_ids).unsqueeze(0),
        }
        if self.layout.has_token_types:
            n_types = int(self._trunk.config.type_vocab_size)
            arguments["token_type_ids"] = inputs.token_types.clamp(max=n_types - 1).unsqueeze(0)
        hidden: Tensor = self._trunk(attention_mask=None, **arguments).last_hidden_state
        return hidden.squeeze(0)

    def features(self, pooled: Tensor) -> Tensor:
        """Return the classifier's inputs [n, hidden_size] of hidden states [n, hidden_size].

        The adapters are those of ``step``, whose rows are these.
        """
        return self._features(pooled)

    def pooled(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Return the row [hidden_size] of a text [n, hidden_size] that its class depends on."""
        if self.classifier_pooling is PoolingMode.CLS:
            return hidden[0]
        return hidden.double().mean(0).to(hidden.dtype)

    def _position_ids(self, token_ids: Tensor) -> Tensor:
        """Return the positions as the embedding counts them; RoBERTa skips padding."""
        positions = self.step.positions
        if self._pad is None:
            return positions
        counts = token_ids.ne(self._pad)
        before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        starts = torch.arange(len(token_ids), device=token_ids.device) - positions
        return (before[1:] - before[starts]) * counts + self._pad


def _spec_of(model: PreTrainedModel, model_id: str) -> BaseSpec:
    """Return the spec of a model without its classifier."""
    layout = ENCODERS[model.config.model_type]
    spec = BaseSpec.of(model, model_id)
    beside = (name for name in spec.modules if not name.startswith(f"{layout.trunk}."))
    pooler = (name for name in spec.modules if name.startswith(f"{layout.trunk}.pooler."))
    return dataclasses.replace(
        spec, classifier=layout.classifier, optional=frozenset((*beside, *pooler))
    )
