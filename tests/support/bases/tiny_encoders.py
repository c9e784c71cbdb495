"""Tiny random text encoders on disk, with tokenizers that write special tokens and token types."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = (
    *("the", "a", "cat", "dog", "small", "tree", "sings"),
    *("runs", "over", "under", "bright", "moon", "river", "slowly"),
)
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
_COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 2,
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
}
_DISTIL = {"dim": 32, "hidden_dim": 44, "n_layers": 2, "n_heads": 4}
_CONFIGS: Mapping[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": _DISTIL,
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "num_hidden_layers": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "classifier_pooling": "mean",
    },
}


def tiny_encoder(model_type: str, **fields: Any) -> PreTrainedModel:
    """Return a classifier of two labels whose weights all matter."""
    torch.manual_seed(0)
    options = {**_COMMON, **_CONFIGS[model_type], **fields}
    if model_type == "distilbert":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            options.pop(name, None)
        options.pop("num_attention_heads", None)
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_tiny_encoder(model_type: str, folder: Path, *, bare: bool = False, **fields: Any) -> Path:
    """Save the classifier, or its trunk alone if ``bare``, with a tokenizer."""
    model = tiny_encoder(model_type, **fields)
    (model.base_model if bare else model).save_pretrained(folder)
    tiny_encoder_tokenizer(model_type).save_pretrained(folder)
    return folder


def tiny_encoder_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, as BERT's or RoBERTa's."""
    is_roberta = "roberta" in model_type
    special = _ROBERTA if is_roberta else _BERT
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    unknown, pad = ("<unk>", "<pad>") if is_roberta else ("[UNK]", "[PAD]")
    first, end = ("<s>", "</s>") if is_roberta else ("[CLS]", "[SEP]")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    between = f"{end} {end}" if is_roberta else f"{end}"
    types = ("", "") if is_roberta or model_type == "modernbert" else (":1", ":1")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {end}",
        pair=f"{first} $A {between} $B{types[0]} {end}{types[1]}",
        special_tokens=[(token, vocabulary[token]) for token in (first, end)],
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        pad_token=pad,
        cls_token=first,
        sep_token=end,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if model_type == "bert"
        else names,
    )
