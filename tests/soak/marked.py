"""A tiny base, and adapters that answer everything with one token of their own: their mark.

Coordinate 0 of the residual stream is the same positive number for every token, and so is that of
each value. The adapter's low-rank factors of ``o_proj`` read it and add the head's row of the mark:
whatever the prompt, the mark's logit is the largest. An answer by another adapter, by the base, or
by factors that were not there, is seen at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer

_LIFT = 4.0  # coordinate 0 of the residual stream
_GAIN = 30.0
_FIRST_MARK = 10  # below it are special tokens


@dataclass(frozen=True, slots=True)
class Content:
    mark: int  # the token that it answers with
    config: bytes
    weights: bytes


def save_marked_base(folder: Path) -> PreTrainedModel:
    model = tiny_model(eos_token_id=2, max_position_embeddings=4096)
    model.model.embed_tokens.weight[:, 0] = _LIFT
    for layer in model.model.layers:
        layer.input_layernorm.weight[0] = 1.0
        layer.self_attn.o_proj.weight[0] = 0.0  # nothing moves coordinate 0
        layer.mlp.down_proj.weight[0] = 0.0
        layer.self_attn.v_proj.weight[0] = 0.0
        layer.self_attn.v_proj.weight[0, 0] = 1.0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_contents(model: PreTrainedModel, folder: Path, n: int) -> list[Content]:
    """``n`` contents of ranks 1 to 16, each with a mark of its own."""
    return [_content(model, folder / str(i), _FIRST_MARK + i, 1 + i % 16) for i in range(n)]


def _content(model: PreTrainedModel, folder: Path, mark: int, rank: int) -> Content:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(mark)
    row: Tensor = model.lm_head.weight[mark].clone()
    row[0] = 0.0
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("o_proj", "q_proj"):
            n_out, n_in = getattr(layer.self_attn, name).weight.shape
            a = 0.1 * torch.randn(rank, n_in, generator=generator)
            b = 0.1 * torch.randn(n_out, rank, generator=generator)
            if name == "o_proj":
                a[0], b[0] = 0.0, 0.0
                a[0, 0] = 1.0
                b[:, 0] = _GAIN * row / row.norm()
            key = f"base_model.model.model.layers.{index}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "marked",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["o_proj", "q_proj"],
    }
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return Content(mark, json.dumps(config).encode(), weights)
