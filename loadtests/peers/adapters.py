"""Random adapters on the default base, as PEFT directories and as GGUF files for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loadtests.random_adapters import ModelShape

__all__ = ["ALL_LINEARS", "adapter_tensors", "write_gguf", "write_peft"]

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def adapter_tensors(
    model: Path, *, rank: int, seed: int, targets: Sequence[str] = ALL_LINEARS, std: float = 0.02
) -> dict[str, Tensor]:
    """PEFT tensor name → bf16 tensor; both factors random, so the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module, (n_out, n_in) in ModelShape.of(model).modules():
        if module.rpartition(".")[2] in targets:
            name = f"base_model.model.{module}"
            a = std * torch.randn(rank, n_in, generator=generator)
            b = std * torch.randn(n_out, rank, generator=generator)
            tensors[f"{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"{name}.lora_B.weight"] = b.bfloat16()
    return tensors


def write_peft(
    folder: Path, tensors: Mapping[str, Tensor], *, rank: int, targets: Sequence[str] = ALL_LINEARS
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m-instruct",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(tensors), folder / "adapter_model.safetensors")


def write_gguf(path: Path, tensors: Mapping[str, Tensor], *, rank: int, n_heads: int) -> None:
    """llama.cpp's adapter format. Rows of q and k are permuted in llama GGUFs, so B's are too."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, tensor in tensors.items():
        parts = name.split(".")
        layer, target, side = parts[4], parts[6], parts[7]
        value = tensor.float()
        if side == "lora_B" and target in ("q_proj", "k_proj"):
            heads = n_heads if target == "q_proj" else value.shape[0] // (576 // n_heads)
            value = _permute_rows(value, heads)
        suffix = "lora_a" if side == "lora_A" else "lora_b"
        writer.add_tensor(f"blk.{layer}.{_GGUF_NAMES[target]}.weight.{suffix}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permute_rows(b: Tensor, n_heads: int) -> Tensor:
    """From transformers' rotate-half order to llama.cpp's interleaved pairs."""
    n_out, rank = b.shape
    paired = b.view(n_heads, 2, n_out // n_heads // 2, rank).transpose(1, 2)
    return paired.reshape(n_out, rank).contiguous()
