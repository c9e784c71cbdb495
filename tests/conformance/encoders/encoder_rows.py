"""Text encoders and the adapters that each is served with; transformers and PEFT are the oracle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import LoraConfig

_SEQ, _TOKEN, _EMBED = "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class EncoderAdapter:
    """An adapter that PEFT trains at random on one of transformers' classes."""

    id: str
    task: str
    config: Callable[[], peft.PeftConfig]
    std: float = 0.15  # of the random step away from where PEFT starts


@dataclass(frozen=True)
class EncoderRow:
    id: str  # docs/bases.md names it
    model_type: str
    query_value: list[str]
    dense: list[str]  # feed-forward, and what has the same name
    norm: str
    config: Mapping[str, Any] = field(default_factory=dict)
    needed: tuple[str, ...] = ()  # modules that classifiers save for their features
    refused: str | None = None  # as of other rows
    wrong: str | None = None

    def adapters(self) -> list[EncoderAdapter]:
        """Return adapters of every kind, whose names say what they are."""
        attention, dense = self.query_value, self.dense
        everything = [*attention, *dense]
        first = attention[0]
        return [
            EncoderAdapter(
                "seq-lora", _SEQ, lambda: LoraConfig(task_type=_SEQ, r=4, target_modules=everything)
            ),
            EncoderAdapter(
                "seq-dora",
                _SEQ,
                lambda: LoraConfig(task_type=_SEQ, r=4, use_dora=True, target_modules=everything),
            ),
            EncoderAdapter(
                "seq-rslora-patterns",
                _SEQ,
                lambda: LoraConfig(
                    task_type=_SEQ,
                    r=4,
                    use_rslora=True,
                    rank_pattern={rf"0\..*{first}": 2},
                    alpha_pattern={first: 3},
                    target_modules=attention,
                ),
            ),
            EncoderAdapter(
                "seq-ia3",
                _SEQ,
                lambda: peft.IA3Config(
                    task_type=_SEQ, target_modules=everything, feedforward_modules=dense
                ),
            ),
            EncoderAdapter(
                "seq-saved",
                _SEQ,
                lambda: LoraConfig(
                    task_type=_SEQ,
                    r=3,
                    bias="lora_only",
                    target_modules=attention,
                    modules_to_save=["classifier", self.norm, *self.needed],
                ),
            ),
            EncoderAdapter(
                "token-lora",
                _TOKEN,
                lambda: LoraConfig(task_type=_TOKEN, r=4, target_modules=attention),
            ),
            EncoderAdapter(
                "embed-lora",
                _EMBED,
                lambda: LoraConfig(task_type=_EMBED, r=4, target_modules=attention),
            ),
            EncoderAdapter(
                "embed-loha",
                _EMBED,
                lambda: peft.LoHaConfig(task_type=_EMBED, r=3, target_modules=attention),
                0.3,
            ),
        ]


_BERT = (["query", "value"], ["dense"], "LayerNorm")

ENCODER_ROWS = (
    EncoderRow("bert", "bert", *_BERT, needed=("pooler",)),
    EncoderRow("roberta", "roberta", *_BERT),
    EncoderRow("xlm-roberta", "xlm-roberta", *_BERT),
    EncoderRow(
        "distilbert",
        "distilbert",
        ["q_lin", "v_lin"],
        ["lin1", "lin2"],
        "sa_layer_norm",
        needed=("pre_classifier",),
    ),
    EncoderRow("modernbert", "modernbert", ["Wqkv"], ["Wi", "Wo"], "mlp_norm"),
    EncoderRow(
        "modernbert-cls",
        "modernbert",
        ["Wqkv"],
        ["Wi", "Wo"],
        "mlp_norm",
        {"classifier_pooling": "cls", "classifier_activation": "silu"},
    ),
)
