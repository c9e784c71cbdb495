"""Writes models as GGUF files with gguf-py, under the names and in the orders of llama.cpp.

gguf-py has no quantiser for the K types. Their blocks are random here, within what a file may hold.

    python -m tests.support.bases.gguf_checkpoint MODEL_FOLDER OUT.gguf --type Q8_0
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Blocks = NDArray[np.uint8]

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "granite": MODEL_ARCH.GRANITE,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "olmoe": MODEL_ARCH.OLMOE,
    "phi3": MODEL_ARCH.PHI3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}
_PAIRED = ("llama", "mixtral", "smollm3", "granite")  # llama.cpp's converter reorders their q and k
_PLUS_ONE = ("gemma", "gemma2", "gemma3_text")
_T = GGMLQuantizationType
# Where the numbers d and m of a block stand, and about what they are for weights of about 1.
_K_NUMBERS: Mapping[GGMLQuantizationType, Mapping[int, float]] = {
    _T.Q3_K: {108: 1 / 40},
    _T.Q4_K: {0: 1 / 250, 2: 7.5 / 250},
    _T.Q5_K: {0: 1 / 500, 2: 15.5 / 500},
    _T.Q6_K: {208: 1 / 1350},
    _T.IQ4_XS: {0: 1 / 1300},
    _T.IQ4_NL: {0: 1 / 70},
}


def blocks_of(weight: torch.Tensor, type: GGMLQuantizationType) -> Blocks:
    """Return ``weight`` [out, in] in blocks: random ones where gguf-py has no quantiser."""
    if type not in _K_NUMBERS:
        blocks: Blocks = quantize(weight.numpy(), type)
        return blocks
    n_values, n_bytes = GGML_QUANT_SIZES[type]
    generator = np.random.default_rng(weight.numel())
    shape = (weight.shape[0], weight.shape[1] // n_values)
    raw = generator.integers(0, 256, (*shape, n_bytes), dtype=np.uint8)
    std = float(weight.std())
    for at, size in _K_NUMBERS[type].items():
        numbers = (std * size * generator.uniform(0.5, 1.5, (*shape, 1))).astype(np.float16)
        raw[:, :, at : at + 2] = numbers.view(np.uint8)
    return raw.reshape(shape[0], -1)


def save_as_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    type_of: Callable[[str], GGMLQuantizationType],
) -> None:
    """Write ``model``, and give it the weights that the file has, dequantised by gguf-py.

    ``type_of``: the type of a matrix, by its name in transformers.
    """
    config = model.config
    arch = _ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            _add_experts(writer, name, parameter, names, type_of(name))
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        if tied and name == "lm_head.weight":
            continue
        if parameter.dim() < 2 or ".mlp.gate." in name:  # a router keeps its values
            plus_one = config.model_type in _PLUS_ONE and name.endswith("norm.weight")
            value = parameter.data.float() + (1.0 if plus_one else 0.0)
            writer.add_tensor(own, _paired(config, name, value.numpy()))
            continue
        type = type_of(name)
        blocks = blocks_of(parameter.data, type)
        parameter.data.copy_(torch.from_numpy(dequantize(blocks, type)))
        writer.add_tensor(own, _paired(config, name, blocks), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_experts(
    writer: GGUFWriter,
    name: str,
    parameter: torch.nn.Parameter,
    names: Any,
    type: GGMLQuantizationType,
) -> None:
    """Write the stacks of ``gate_up_proj`` and ``down_proj`` as llama.cpp's converter does."""
    stem, _, last = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    stacks = parameter.data.chunk(len(parts), dim=1)
    for part, stack in zip(parts, stacks, strict=True):
        blocks = blocks_of(stack.reshape(-1, stack.shape[-1]), type)
        stack.copy_(torch.from_numpy(dequantize(blocks, type)).view(stack.shape))
        own = names.get_name(f"{stem}.{part}.weight", try_suffixes=(".weight",))
        shaped = blocks.reshape(*stack.shape[:2], -1)
        writer.add_tensor(own, shaped, raw_dtype=type)


def _paired(config: Any, name: str, rows: NDArray[Any]) -> NDArray[Any]:
    """As ``LlamaModel.permute`` of llama.cpp's converter."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if config.model_type not in _PAIRED or module not in heads:
        return rows
    n = heads[module]
    halves = rows.reshape(n, 2, rows.shape[0] // n // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _add_config(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    n_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if n_experts is not None:
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if (clip := getattr(config, "clip_qkv", None)) is not None:
        writer.add_clamp_kqv(clip)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model of one type of blocks.")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q8_0", choices=sorted(type.name for type in _T))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    save_as_gguf(model, tokenizer, options.out, lambda name: _T[options.type])


if __name__ == "__main__":
    main()
