"""Writes PEFT directories with random factors, without PEFT."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex_adapter_store.base_spec import BaseSpec


def write_lora(
    folder: Path,
    spec: BaseSpec,
    *,
    rank: int = 4,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    scale: float = 0.2,
    chat_template: str | None = None,
) -> Path:
    """Write a plain LoRA over ``targets`` of every layer; alpha = rank, so the scale is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in spec.modules.items():
        if name.rpartition(".")[2] in targets:
            a = torch.randn(rank, shape.in_features, generator=generator) * scale
            b = torch.randn(shape.out_features, rank, generator=generator) * scale
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.model_id,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "fan_in_fan_out": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder
