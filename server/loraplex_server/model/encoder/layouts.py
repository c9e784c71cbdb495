"""The served architectures of text encoders, by model type.

A layout names the parts of transformers' ``…ForSequenceClassification``:

    text → trunk → hidden states → one row (CLS or mean) → features → classifier → logits
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Features = Callable[[Tensor], Tensor]  # pooled rows [n, hidden_size] → inputs of the classifier


@dataclass(frozen=True, slots=True)
class EncoderLayout:
    """The parts of an architecture, by their names in the model."""

    trunk: str
    classifier: str  # the linear of the labels
    features: Callable[[PreTrainedModel], Features]  # reads its modules when it is called
    has_token_types: bool = False  # the two texts of a pair have embeddings of their own
    counts_from_pad: bool = False  # positions begin behind the id of padding
    classifies_tokens_by_features: bool = False  # …ForTokenClassification has the same features


def _bert(model: PreTrainedModel) -> Features:
    pooler = model.get_submodule("bert.pooler")
    return lambda rows: pooler(rows.unsqueeze(1))


def _roberta(model: PreTrainedModel) -> Features:
    head = model.get_submodule("classifier")
    return lambda rows: head(rows.unsqueeze(1))


def _distilbert(model: PreTrainedModel) -> Features:
    linear = model.get_submodule("pre_classifier")
    return lambda rows: torch.relu(linear(rows))


def _modernbert(model: PreTrainedModel) -> Features:
    head = model.get_submodule("head")
    return lambda rows: head(rows)


_ROBERTA = EncoderLayout(
    "roberta", "classifier.out_proj", _roberta, has_token_types=True, counts_from_pad=True
)

ENCODERS: Mapping[str, EncoderLayout] = {
    "bert": EncoderLayout("bert", "classifier", _bert, has_token_types=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": EncoderLayout("distilbert", "classifier", _distilbert),
    "modernbert": EncoderLayout(
        "model", "classifier", _modernbert, classifies_tokens_by_features=True
    ),
}
