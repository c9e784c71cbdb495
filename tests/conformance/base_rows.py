"""Tiny random bases: each is served as transformers computes it, or refused at start.

Every shape is odd on purpose: grouped queries, an MLP that is not four times as wide, windows
shorter than the prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 300,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "v_proj", "o_proj")
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROUTED = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class BaseRow:
    id: str  # docs/bases.md names it
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)  # beside the common one
    targets: tuple[str, ...] = _LLAMA_TARGETS  # of the LoRA
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # more LoRAs
    single_experts: bool = False  # also a LoRA on each expert, as of transformers 4
    refused: str | None = None  # pattern of the reason, where the server does not start
    wrong: str | None = None  # what it does instead, while it is wrong


def base_config(row: BaseRow) -> dict[str, Any]:
    common = _GPT2 if row.model_type == "gpt2" else _COMMON
    return {**common, **row.config}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


_BIASES = {
    "bias-lora-only": {"bias": "lora_only"},
    "bias-all": {"bias": "all"},
    "dora-with-biases": {"use_dora": True},
}

_ROWS_AND_HEAD: dict[str, dict[str, Any]] = {
    "lora-of-head": {"target_modules": ["q_proj", "lm_head"]},
    "lora-of-embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "trained-rows": {"trainable_token_indices": list(range(5, 105))},
    "saved-norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
}
_CONV1D = {
    "dora-of-conv1d": {"use_dora": True, "fan_in_fan_out": True},
    "saved-layer-norm": {"modules_to_save": ["ln_f"], "fan_in_fan_out": True},
}
_FUSED_EXPERTS = {
    "fused-experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
}
_EVERY_LINEAR = {
    **_FUSED_EXPERTS,
    "all-linear": {"target_modules": "all-linear"},
    "all-linear-patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"gate.weight": 2, "experts.down_proj": 3},
        "alpha_pattern": {"gate.weight": 20, "self_attn.q_proj": 12},
        "use_rslora": True,
    },
}
_ROUTER = {
    **_FUSED_EXPERTS,
    "router": {"target_parameters": ["router.weight"]},
}

BASE_ROWS: tuple[BaseRow, ...] = (
    # Llama, its biases and its rotary embeddings
    BaseRow("llama", "llama", adapters=_ROWS_AND_HEAD),
    BaseRow("llama-tied", "llama", {"tie_word_embeddings": True}, adapters=_ROWS_AND_HEAD),
    BaseRow("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}, adapters=_BIASES),
    BaseRow("llama-gelu", "llama", {"hidden_act": "gelu"}),
    BaseRow("llama-rope-linear", "llama", _rope(rope_type="linear", factor=4.0)),
    BaseRow("llama-rope-dynamic", "llama", _rope(rope_type="dynamic", factor=4.0)),
    BaseRow("llama-rope-yarn", "llama", _rope(**_YARN)),
    BaseRow(
        "llama-rope-llama3",
        "llama",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    BaseRow(
        "llama-rope-longrope",
        "llama",
        _rope(
            rope_type="longrope",
            factor=8.0,
            short_factor=[1.0 + 0.1 * i for i in range(8)],
            long_factor=[2.0 + 0.5 * i for i in range(8)],
            original_max_position_embeddings=96,
        ),
    ),
    # as Llama, with something of their own
    BaseRow("mistral-window", "mistral", {"sliding_window": 16}),
    BaseRow("mistral-no-window", "mistral", {"sliding_window": None}),
    BaseRow("qwen2", "qwen2", adapters=_BIASES),
    BaseRow(
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    BaseRow("qwen3", "qwen3", {"head_dim": 32}),
    BaseRow("gemma", "gemma"),
    BaseRow("gemma2", "gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 24}),
    BaseRow("gemma3", "gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 24}),
    BaseRow(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
        },
    ),
    BaseRow("cohere", "cohere", {"logit_scale": 0.3}),
    BaseRow(
        "cohere2",
        "cohere2",
        {"logit_scale": 0.3, "sliding_window": 16},
    ),
    BaseRow("olmo", "olmo"),
    BaseRow("olmo2", "olmo2"),
    BaseRow("smollm3", "smollm3", {"no_rope_layer_interval": 2}),
    BaseRow("glm", "glm", targets=("q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")),
    BaseRow("glm4", "glm4", targets=("q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")),
    BaseRow("exaone4", "exaone4", {"sliding_window": 16, "sliding_window_pattern": 2}),
    BaseRow("ernie4_5", "ernie4_5", {"use_bias": True}),
    BaseRow("hunyuan", "hunyuan_v1_dense"),
    BaseRow("seed-oss", "seed_oss"),
    BaseRow("helium", "helium"),
    BaseRow("phi3", "phi3", targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    BaseRow(
        "phi3-longrope",
        "phi3",
        {
            **_rope(
                rope_type="longrope",
                short_factor=[1.0 + 0.1 * i for i in range(8)],
                long_factor=[2.0 + 0.5 * i for i in range(8)],
                original_max_position_embeddings=96,
            ),
            "original_max_position_embeddings": 96,
        },
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    # other layers
    BaseRow("phi", "phi", targets=("q_proj", "v_proj", "dense", "fc1", "fc2")),
    BaseRow("stablelm", "stablelm"),
    BaseRow("stablelm-parallel", "stablelm", {"use_parallel_residual": True}),
    BaseRow(
        "starcoder2",
        "starcoder2",
        {"sliding_window": 16},
        targets=("q_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    ),
    BaseRow("gpt2", "gpt2", targets=("c_attn", "c_fc", "c_proj"), adapters=_CONV1D),
    BaseRow(
        "gpt-neox",
        "gpt_neox",
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    BaseRow("nemotron", "nemotron", targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
    BaseRow("olmo3", "olmo3", {"sliding_window": 16}),
    BaseRow("ministral3", "ministral3"),
    BaseRow(
        "minicpm3",
        "minicpm3",
        {**_LATENT, "head_dim": 24, "dim_model_base": 16},
        targets=("q_a_proj", "kv_b_proj", "o_proj", "gate_proj", "down_proj"),
    ),
    BaseRow("opt", "opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, targets=("q_proj", "fc1")),
    BaseRow("gptj", "gptj", {**_GPT2, "rotary_dim": 8}, targets=("q_proj", "v_proj", "fc_in")),
    BaseRow("gpt-bigcode", "gpt_bigcode", _GPT2, targets=("c_attn", "c_fc", "c_proj")),
    # mixtures of experts: a LoRA on the attention
    BaseRow(
        "mixtral",
        "mixtral",
        {"num_local_experts": 4},
        targets=_ATTENTION,
        adapters=_EVERY_LINEAR,
        single_experts=True,
    ),
    BaseRow(
        "qwen2-moe",
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 48},
        targets=_ATTENTION,
    ),
    BaseRow(
        "qwen3-moe",
        "qwen3_moe",
        _EXPERTS,
        targets=_ATTENTION,
        adapters=_EVERY_LINEAR,
        single_experts=True,
    ),
    BaseRow(
        "olmoe",
        "olmoe",
        {**_EXPERTS, "num_key_value_heads": 4},
        targets=_ATTENTION,
        adapters=_EVERY_LINEAR,
    ),
    BaseRow(
        "granite-moe",
        "granitemoe",
        {"num_local_experts": 4, "logits_scaling": 2.5, "attention_multiplier": 0.2},
        targets=_ATTENTION,
    ),
    BaseRow(
        "gpt-oss",
        "gpt_oss",
        {"num_local_experts": 4, "sliding_window": 16},
        targets=_ATTENTION,
        adapters=_ROUTER,
    ),
    BaseRow("ernie4_5-moe", "ernie4_5_moe", {**_ROUTED, "moe_num_experts": 4}, targets=_ATTENTION),
    BaseRow("glm4-moe", "glm4_moe", _ROUTED, targets=_ATTENTION, adapters=_EVERY_LINEAR),
    BaseRow("hunyuan-moe", "hunyuan_v1_moe", {"num_experts": 4}, targets=_ATTENTION),
    BaseRow("phimoe", "phimoe", _EXPERTS, targets=_ATTENTION),
    BaseRow(
        "deepseek-v3",
        "deepseek_v3",
        {**_ROUTED, **_LATENT, "head_dim": 8},
        targets=("q_a_proj", "kv_b_proj", "o_proj"),
    ),
    BaseRow(
        "llama4",
        "llama4_text",
        {"num_local_experts": 4, "attention_chunk_size": 256},
        targets=_ATTENTION,
    ),
    # refused at start
    BaseRow("bloom", "bloom", {"n_layer": 2, "n_head": 4}, refused="takes no position_ids"),
    BaseRow("mpt", "mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}, refused="no position_ids"),
    BaseRow("mamba", "mamba", refused="recurrent state"),
    BaseRow(
        "falcon-h1",
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
        refused="recurrent state",
    ),
    BaseRow(
        "lfm2",
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv"]},
        refused="of its 3 layers 1 attend",
    ),
    BaseRow(
        "llama4-chunks",
        "llama4_text",
        {"num_local_experts": 4, "attention_chunk_size": 16},
        refused="by chunk",
    ),
    BaseRow("doge", "doge", refused="mask or bias that the model computes itself"),
    BaseRow("diffllama", "diffllama", refused="attends more than once"),
)
