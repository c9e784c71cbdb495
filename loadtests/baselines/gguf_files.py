"""Converts PEFT LoRA directories to GGUF files, which llama.cpp reads."""

import json
from pathlib import Path

from gguf import GGUFWriter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

_NAMES = {  # PEFT's module → llama.cpp's
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_gguf(adapter: Path, model: Path, path: Path) -> None:
    """Write the adapter as a GGUF file. ``model``: the directory of its Llama or Qwen 2 base."""
    config = AutoConfig.from_pretrained(model)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    interleaved = heads if config.model_type == "llama" else {}
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    writer = GGUFWriter(path, config.model_type)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        # base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
        parts = name.split(".")
        layer, module, factor = parts[4], parts[6], parts[7]
        value = tensor.float()
        if factor == "lora_B" and module in interleaved:
            value = _interleave_rows(value, interleaved[module])
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight.{factor.lower()}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave_rows(b: Tensor, n_heads: int) -> Tensor:
    """Reorder rows of q and k from transformers' rotate-half to llama.cpp's interleaved pairs."""
    n_out, rank = b.shape
    paired = b.view(n_heads, 2, n_out // n_heads // 2, rank).transpose(1, 2)
    return paired.reshape(n_out, rank).contiguous()
