"""LoRAs on single experts and routers, as PEFT writes them where experts are linears of their own.

transformers 4 has such modules and transformers 5 has not, so the file is written here. PEFT loads
it into today's model, which makes PEFT the oracle.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

_RANK, _ALPHA = 3, 5


def single_experts(model: PreTrainedModel) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the config and tensors of a LoRA on attention, routers and experts of ``model``."""
    is_mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if is_mixtral else "mlp"
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}

    def add(module: str, n_out: int, n_in: int) -> None:
        for leaf, shape in (("A", (_RANK, n_in)), ("B", (n_out, _RANK))):
            name = f"base_model.model.{module}.lora_{leaf}.weight"
            tensors[name] = 0.3 * torch.randn(shape, generator=generator)

    for name, parameter in model.named_parameters():
        module, _, leaf = name.replace(".mlp.", f".{block}.").rpartition(".")
        if name.endswith((".q_proj.weight", ".mlp.gate.weight")):
            add(module, *parameter.shape)
        elif leaf == "gate_up_proj":
            n_experts, n_rows, n_in = parameter.shape
            for expert in range(n_experts):
                add(f"{module}.{expert}.{gate}", n_rows // 2, n_in)
                add(f"{module}.{expert}.{up}", n_rows // 2, n_in)
        elif leaf == "down_proj":
            for expert in range(len(parameter)):
                add(f"{module}.{expert}.{down}", *parameter.shape[1:])
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "target_modules": ["q_proj", "gate", gate, up, down],
    }
    return config, tensors


def save_single_experts(model: PreTrainedModel, folder: Path) -> None:
    config, tensors = single_experts(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
