"""Loads a GGUF file as a transformers model whose matrices stay in blocks."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loraplex_kernels.cpu.gguf_weight import GgufWeight
from loraplex_server.model.errors import ModelError
from loraplex_server.model.quantized.quantized_modules import BlockEmbedding, install_quantized

from .gguf_experts import ExpertBlocks, block_experts
from .gguf_file import GgufFile

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate",
    "ffn_up_exps": "mlp.experts.up",
    "ffn_down_exps": "mlp.experts.down",
}
_FUSED_LAYER = {"ffn_up": "mlp.gate_up_proj"}
_GEMMA_LAYER = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS = {"phi3": _FUSED_LAYER, "gemma2": _GEMMA_LAYER, "gemma3": _GEMMA_LAYER}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_NOT_WEIGHTS = ("rope_freqs.weight",)  # are in the config
_PAIRS_ROTATED = ("llama", "smollm3", "granite")  # rows of q and k stand in pairs to rotate
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")


def load_gguf(
    path: Path, folder: Path, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Return the model of the file ``path``, whose config is in ``folder``.

    On the CPU its matrices are those of the mapped file. Other devices get plain weights. Raises
    ModelError for missing or unexpected tensors.
    """
    file = GgufFile(path)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain: dict[str, Tensor] = {}
    blocks: dict[str, GgufWeight] = {}
    experts: dict[str, dict[str, str]] = {}  # module → part → tensor
    for name, tensor in _parameters(file):
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if module.endswith(".experts"):
            experts.setdefault(module, {})[part] = tensor
            continue
        weight = file.blocks(tensor, dtype)
        rows = _rows_of_heads(file, tensor, config.num_attention_heads, config.num_key_value_heads)
        if weight is None or device.type != "cpu":
            values = file.plain(tensor)
            values = values if rows is None else values[rows]
            values = values - 1 if _is_norm_plus_one(file, name) else values
            plain[name] = values.to(dtype)
        else:
            module = name.removesuffix(".weight")
            blocks[module] = weight if rows is None else replace(weight, rows=weight.rows[rows])
    for module, parts in experts.items():
        stack = _expert_blocks(file, parts, dtype) if device.type == "cpu" else None
        if stack is None:
            plain |= {f"{module}.{name}": v for name, v in _plain_experts(file, parts, dtype)}
        else:
            theirs = model.get_submodule(module)
            count = theirs.get_parameter("down_proj").shape[0]
            model.set_submodule(module, block_experts(stack, count, theirs.act_fn))
    _fill(model, plain, blocks, file)
    return model


def _expert_blocks(
    file: GgufFile, parts: Mapping[str, str], dtype: torch.dtype
) -> ExpertBlocks | None:
    """Return a layer's experts in blocks; None if one of the three stacks has plain values."""
    weights = [file.blocks(parts[part], dtype) for part in ExpertBlocks._fields if part in parts]
    found = [weight for weight in weights if weight is not None]
    return ExpertBlocks(*found) if len(found) == len(ExpertBlocks._fields) else None


def _plain_experts(
    file: GgufFile, parts: Mapping[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stacks of a layer's experts as transformers has them."""
    values = {part: file.plain(tensor).to(dtype) for part, tensor in parts.items()}
    if "gate" in values and "up" in values:
        yield "gate_up_proj", torch.cat([values["gate"], values["up"]], dim=1)
    if "down" in values:
        yield "down_proj", values["down"]


def _parameters(file: GgufFile) -> Iterator[tuple[str, str]]:
    """Yield the name of each parameter in transformers and in the file."""
    layer_names = _LAYER | _LAYERS.get(file.architecture, {})
    for tensor in file.tensors:
        if tensor in _NOT_WEIGHTS:
            continue
        stem, _, leaf = tensor.rpartition(".")
        if stem.startswith("blk."):
            _, index, part = stem.split(".", 2)
            module = f"model.layers.{index}.{layer_names[part]}" if part in layer_names else None
        else:
            module = _TOP.get(stem)
        if module is None:
            raise ModelError(
                f"{str(file.path)!r} has a tensor {tensor}, which {file.architecture!r} has no "
                "place for"
            )
        yield f"{module}.{leaf}", tensor


def _rows_of_heads(file: GgufFile, tensor: str, n_heads: int, n_kv_heads: int) -> Tensor | None:
    """Return the order of rows that transformers has; None if it is the file's.

    llama.cpp rotates neighbours, transformers the halves of a head.
    """
    part = tensor.rpartition(".")[0].rpartition(".")[2]
    if file.architecture not in _PAIRS_ROTATED or part not in ("attn_q", "attn_k"):
        return None
    n_rows = file.tensors[tensor].shape[0]
    heads = n_heads if part == "attn_q" else n_kv_heads
    pairs = torch.arange(n_rows).view(heads, n_rows // heads // 2, 2)
    return pairs.transpose(1, 2).reshape(-1)


def _is_norm_plus_one(file: GgufFile, name: str) -> bool:
    return file.architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight")


def _fill(
    model: PreTrainedModel,
    plain: Mapping[str, Tensor],
    blocks: Mapping[str, GgufWeight],
    file: GgufFile,
) -> None:
    """Give the model its weights, of which it has only shapes."""
    tied = bool(model.config.tie_word_embeddings)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if tied:
        expected.pop("lm_head.weight", None)
    given = {name: tuple(t.shape) for name, t in plain.items()}
    given |= {f"{name}.weight": weight.shape for name, weight in blocks.items()}
    problems = [f"it lacks {name}" for name in expected.keys() - given.keys()]
    problems += [f"no place for {name}" for name in given.keys() - expected.keys()]
    problems += [
        f"{name} is {list(shape)}, and the model's {list(expected[name])}"
        for name, shape in given.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        more = " …" if len(problems) > 4 else ""
        raise ModelError(
            f"{str(file.path)!r} does not fit a model of {file.architecture!r}: "
            + "; ".join(sorted(problems)[:4])
            + more
        )
    model.load_state_dict(dict(plain), strict=False, assign=True)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    linears = dict(blocks)
    table = linears.pop(name, None)
    if table is not None:
        scale = getattr(embedding, "embed_scale", None)
        model.set_submodule(name, BlockEmbedding(table, scale))
        if tied:
            linears["lm_head"] = table
    elif tied:
        model.tie_weights()
    install_quantized(model, linears)
