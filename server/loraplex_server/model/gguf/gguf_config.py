"""Turns the metadata of a GGUF file into the config of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from loraplex_server.model.errors import ModelError

from .gguf_file import GgufFile

# Names of llama.cpp → names of transformers, of every architecture.
_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
_LLAMA3_LENGTH = 8192  # that Llama 3's positions were scaled from
_LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window


class _Metadata:
    """Metadata below the architecture's name."""

    def __init__(self, file: GgufFile) -> None:
        self._file, self._prefix = file, file.architecture

    def has(self, name: str) -> bool:
        return f"{self._prefix}.{name}" in self._file.metadata

    def get(self, name: str, default: Any = None) -> Any:
        """Raises ModelError if the value is missing and has no default."""
        value = self._file.metadata.get(f"{self._prefix}.{name}", default)
        if value is None:
            raise ModelError(f"{str(self._file.path)!r} has no {self._prefix}.{name}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """Return a number that was written as float32, as it was meant: 1e-5."""
        return float(f"{float(self.get(name, default)):.7g}")


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises ModelError for an unknown architecture or missing values, by name.
    """
    name = file.architecture
    if name == "llama" and "blk.0.ffn_gate_inp.weight" in file.tensors:
        name = _MIXTRAL
    architecture = _ARCHITECTURES.get(name)
    if architecture is None:
        raise ModelError(
            f"{str(file.path)!r} has the architecture {file.architecture!r}; these are served from "
            f"GGUF: {', '.join(_ARCHITECTURES)}. Serve the model's safetensors instead"
        )
    data = _Metadata(file)
    config = {theirs: data.get(ours) for ours, theirs in _COMMON.items()}
    n_heads = config["num_attention_heads"]
    rotated = data.get("rope.dimension_count", config["hidden_size"] // n_heads)
    config |= {
        "num_key_value_heads": data.get("attention.head_count_kv", n_heads),
        "head_dim": data.get("attention.key_length", rotated),
        "rms_norm_eps": data.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, data),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    for ours, theirs in _TOKENS.items():
        config[theirs] = file.metadata.get(f"tokenizer.ggml.{ours}")
    config["model_type"] = architecture.model_type
    config["architectures"] = [architecture.model_class]
    return config | architecture.own_fields(data, config)


def _rope(file: GgufFile, data: _Metadata) -> dict[str, Any]:
    theta = data.real("rope.freq_base", 10000.0)
    if "rope_factors_long.weight" in file.tensors:
        raise ModelError(
            f"{str(file.path)!r} has rope_factors_long.weight: positions that are scaled as in "
            "LongRoPE are not read from GGUF; serve the model's safetensors instead"
        )
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, **_llama3_scaling(file)}
    kind = data.get("rope.scaling.type", "none")
    if kind == "none" or not data.has("rope.scaling.factor"):
        return {"rope_theta": theta, "rope_type": "default"}
    factor = data.real("rope.scaling.factor")
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        length = data.get("rope.scaling.original_context_length")
        return {
            "rope_theta": theta,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
        }
    raise ModelError(f"{str(file.path)!r} scales positions by {kind!r}; linear and yarn are read")


def _llama3_scaling(file: GgufFile) -> dict[str, Any]:
    """Return the parameters whose factors are ``rope_freqs.weight``: the largest is ``factor``."""
    return {
        "rope_type": "llama3",
        "factor": float(file.plain("rope_freqs.weight").max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_LENGTH,
    }


def _nothing(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _smollm3(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"no_rope_layer_interval": 4}


def _granite(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embedding_multiplier": data.real("embedding_scale", 1.0),
        "residual_multiplier": data.real("residual_scale", 1.0),
        "attention_multiplier": data.real("attention.scale", config["head_dim"] ** -0.5),
        "logits_scaling": data.real("logit_scale", 1.0),
    }


def _phi3(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope = dict(config["rope_parameters"])
    rope["partial_rotary_factor"] = data.get("rope.dimension_count", head_dim) / head_dim
    return {
        "rope_parameters": rope,
        "head_dim": head_dim,
        "sliding_window": data.get("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": data.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }


def _gemma(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
    }


def _gemma2(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
        "sliding_window": data.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": data.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": data.real("final_logit_softcapping", 30.0),
    }


def _gemma3(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
        "sliding_window": data.get("attention.sliding_window", 1024),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_THETA},
        },
    }


def _query_scalar(config: Mapping[str, Any], *, layers_of_27b: int) -> int:
    """Return the number that GGUF leaves out: of a head's width, but in the 27B models."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _mixtral(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": data.get("expert_count"),
        "num_experts_per_tok": data.get("expert_used_count"),
        "sliding_window": None,
    }


def _qwen3moe(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": data.get("expert_count"),
        "num_experts_per_tok": data.get("expert_used_count"),
        "moe_intermediate_size": data.get("expert_feed_forward_length"),
        "norm_topk_prob": True,  # as llama.cpp does, which has no number for it
    }


def _olmoe(data: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": data.get("expert_count"),
        "num_experts_per_tok": data.get("expert_used_count"),
        "norm_topk_prob": False,
        "clip_qkv": data.real("attention.clamp_kqv", 0.0) or None,
    }


class _Architecture(NamedTuple):
    """The classes of an architecture in transformers, and the fields that it alone has."""

    model_type: str
    model_class: str
    own_fields: Callable[[_Metadata, Mapping[str, Any]], dict[str, Any]]


_MIXTRAL = "llama with experts"  # whose files have the architecture "llama"
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("llama", "LlamaForCausalLM", _nothing),  # and Mistral, SmolLM2
    _MIXTRAL: _Architecture("mixtral", "MixtralForCausalLM", _mixtral),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", _nothing),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _nothing),
    "qwen3moe": _Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3moe),
    "olmoe": _Architecture("olmoe", "OlmoeForCausalLM", _olmoe),
    "smollm3": _Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3),
    "granite": _Architecture("granite", "GraniteForCausalLM", _granite),
    "phi3": _Architecture("phi3", "Phi3ForCausalLM", _phi3),
    "gemma": _Architecture("gemma", "GemmaForCausalLM", _gemma),
    "gemma2": _Architecture("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": _Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3),
}
