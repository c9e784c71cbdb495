"""Small random transformers models of the architectures the server is tested with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["ARCHITECTURES", "VOCAB_SIZE", "tiny_model"]

VOCAB_SIZE = 300
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": 16},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 32},
    "gemma": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": _COMMON | {"head_dim": 16, "sliding_window": 16},
    "phi3": _COMMON,
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model in eval mode whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(ARCHITECTURES[model_type] | changes))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().float().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model
