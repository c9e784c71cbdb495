"""Small random transformers models of the architectures the server is tested with."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
    "phi": _COMMON,
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
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


# name → model type and config: bases with something of their own in attention, positions or logits
RARE_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "rope-linear": ("llama", _rope(rope_type="linear", factor=4.0)),
    "rope-dynamic": ("llama", _rope(rope_type="dynamic", factor=4.0)),
    "rope-yarn": (
        "llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "rope-llama3": (
        "llama",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "rope-longrope": (
        "llama",
        _rope(
            rope_type="longrope",
            factor=2.0,
            short_factor=[1.0 + 0.1 * i for i in range(8)],
            long_factor=[2.0 + 0.5 * i for i in range(8)],
            original_max_position_embeddings=128,
        ),
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", {"logit_scale": 0.3, "sliding_window": 16}),
    "minicpm3": ("minicpm3", {**_LATENT, "head_dim": 24, "dim_model_base": 16}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 5.0}),
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": 2}),  # a field that GPT-NeoX does not read
    "gptj": ("gptj", {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "multi-query": ("gpt_bigcode", {"n_embd": 64, "n_layer": 3, "n_head": 4}),
    "inverse-layer-scale": (
        "gpt2",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "deepseek": ("deepseek_v3", {**_EXPERTS, **_LATENT, "head_dim": 8}),
    "gpt-oss": ("gpt_oss", {**_EXPERTS, "sliding_window": 16}),
    "mixtral-window": ("mixtral", {**_EXPERTS, "sliding_window": 16}),
    "phimoe": ("phimoe", _EXPERTS),  # its router is a linear that returns two tensors
    "hunyuan-moe": ("hunyuan_v1_moe", {**_EXPERTS, "moe_topk": 2}),
    "llama4": ("llama4_text", {**_EXPERTS, "attention_chunk_size": 256}),
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a float32 model in eval mode with random norms and biases."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(ARCHITECTURES.get(model_type, _COMMON) | changes))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().float().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model
