"""A tiny base on disk for the tests of generation."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

_FIELDS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def tiny_qwen2_directory(folder: Path, *, spread: float = 0.1) -> Path:
    """Save a random Qwen2 of three layers; `spread` is the deviation of its weights.

    The biases of q, k and v are random, too.
    """
    torch.manual_seed(1)
    config = Qwen2Config(**_FIELDS, initializer_range=spread, eos_token_id=2)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder
