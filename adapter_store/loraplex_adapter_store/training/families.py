"""The kinds of adapter that can be trained: one row each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config import AdapterShape
from .errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FAMILIES", "TrainableFamily", "family_of"]


@dataclass(frozen=True, slots=True)
class TrainableFamily:
    """How one family is put on a base, and how it is written.

    ``attach`` returns the model to call; exactly the adapter's parameters require gradients.
    ``save`` writes adapter_config.json and adapter_model.safetensors into an existing folder.
    ``extra_loss`` is added to the loss of each step (a load-balancing term, for example).
    """

    summary: str
    attach: Callable[[nn.Module, AdapterShape], nn.Module]
    save: Callable[[nn.Module, AdapterShape, str, Path], None]  # (model, shape, base name, folder)
    extra_loss: Callable[[nn.Module], Tensor] | None = None


def family_of(name: str) -> TrainableFamily:
    """Raises TrainingError with the known names."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise TrainingError(
            f"family {name!r} cannot be trained; choose {', '.join(FAMILIES)}"
        ) from None


def _attach_lora(model: nn.Module, shape: AdapterShape) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = list(shape.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=targets,
        layers_to_transform=None if shape.layers is None else list(shape.layers),
        use_rslora=shape.rslora,
        lora_dropout=shape.dropout,
    )
    try:
        attached: nn.Module = get_peft_model(model, config)
    except ValueError as error:  # PEFT: target modules not found
        raise TrainingError(str(error)) from error
    return attached


def _save_lora(model: nn.Module, shape: AdapterShape, base_name: str, folder: Path) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    dtype: torch.dtype = getattr(torch, shape.stored_dtype)
    tensors_of = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors_of.items()
    }
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TrainingError(f"{len(bad)} tensors are not finite as {dtype}, first {bad[0]}")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True, default=_jsonable)
    (folder / "adapter_config.json").write_text(text + "\n")


def _jsonable(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", str(value))  # enums of PEFT


FAMILIES: dict[str, TrainableFamily] = {
    "lora": TrainableFamily("low-rank factors on linear layers", _attach_lora, _save_lora),
}
