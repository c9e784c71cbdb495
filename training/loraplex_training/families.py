"""The families of adapters that can be trained, one row each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config import AdapterShape, BlockShape, ExpertShape
from .errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TrainableFamily:
    """The functions of one family.

    ``attach`` returns the model to call, in which only the adapter's parameters require gradients.
    ``save`` writes adapter_config.json and adapter_model.safetensors into an existing folder.
    ``load`` copies the tensors of such a file into the attached adapter, or raises TrainingError.
    ``extra_loss`` is added to the loss of each step, for example to balance experts.
    """

    attach: Callable[[nn.Module, AdapterShape], nn.Module]
    save: Callable[[nn.Module, AdapterShape, str, Path], None]  # (model, shape, base name, folder)
    load: Callable[[nn.Module, dict[str, Tensor]], None]
    extra_loss: Callable[[nn.Module], Tensor] | None = None


def family_of(name: str) -> TrainableFamily:
    """Return the family called ``name``. Raises TrainingError with the known names."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise TrainingError(
            f"family {name!r} cannot be trained; choose {', '.join(FAMILIES)}"
        ) from None


def check_start(adapter: Path, shape: AdapterShape) -> None:
    """Raise TrainingError if the adapter's tensors would have another scale or routing in a run."""
    try:
        config = dict(json.loads((adapter / "adapter_config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"cannot start from {adapter}: {error}") from error
    for field, own, remedy in _scale_and_routing(shape):
        theirs = config.get(field)
        if (theirs or None) != (own or None):
            raise TrainingError(
                f"cannot start from {adapter}: its {field} is {theirs}, that of this run {own}; "
                f"give {remedy.format(theirs)}"
            )


def _scale_and_routing(shape: AdapterShape) -> list[tuple[str, object, str]]:
    """Return fields of adapter_config.json, their values in this run, and the option of each."""
    experts, blocks = shape.experts or ExpertShape(), shape.blocks or BlockShape()
    of_family: dict[str, list[tuple[str, object, str]]] = {
        "mixlora": [
            ("num_experts", experts.n_experts, "--experts {}"),
            ("top_k", experts.top_k, "--top-k {}"),
        ],
        "block-lora": [
            ("n_blocks", blocks.n_blocks, "--blocks {}"),
            ("block_axis", blocks.axis, "--block-axis {}"),
        ],
    }
    return [
        ("peft_type", shape.family.replace("-", "_").upper(), "its --family"),
        ("r", shape.rank, "--rank {}"),
        ("lora_alpha", shape.alpha, "--alpha {}"),
        ("alpha_pattern", {}, "an adapter with one alpha"),
        ("use_rslora", shape.rslora, "no --rslora" if shape.rslora else "--rslora"),
        *of_family.get(shape.family, []),
    ]


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
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    _write(folder, tensors, shape, config)


def _load_lora(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: tensor.shape for name, tensor in own.items()} != {
        name: tensor.shape for name, tensor in tensors.items()
    }:
        raise TrainingError("the adapter to start from has another shape; give its rank and layers")
    set_peft_model_state_dict(model, tensors)


def _jsonable(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", str(value))  # enums of PEFT


def _attach_mixlora(model: nn.Module, shape: AdapterShape) -> nn.Module:
    from .attached import Attached
    from .mixlora import MixLora

    _refuse_unused(shape, "mixlora", targets=("all-linear",))
    try:
        return Attached(model, lambda base: MixLora(base, shape))
    except AttributeError as error:
        raise TrainingError(f"MixLoRA needs a base of the Llama layout: {error}") from error


def _attach_block_lora(model: nn.Module, shape: AdapterShape) -> nn.Module:
    from .attached import Attached
    from .block_lora import BlockLora

    _refuse_unused(shape, "block-lora")
    try:
        return Attached(model, lambda base: BlockLora(base, shape))
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _refuse_unused(
    shape: AdapterShape, family: str, *, targets: Sequence[str] | None = None
) -> None:
    """Raise TrainingError for options that this family does not have."""
    if shape.layers is not None:
        raise TrainingError(f"{family} adapts every layer; leave the choice of layers out")
    if shape.rslora:
        raise TrainingError(f"{family} is scaled by alpha / rank; leave rsLoRA out")
    if targets is not None and tuple(shape.targets) != tuple(targets):
        raise TrainingError(f"{family} adapts {', '.join(targets)}; leave the targets out")


def _save_ours(model: nn.Module, shape: AdapterShape, base_name: str, folder: Path) -> None:
    from .attached import Attached

    assert isinstance(model, Attached)
    _write(folder, model.adapter.tensors(), shape, model.adapter.adapter_config(base_name))


def _write(
    folder: Path, tensors: dict[str, Tensor], shape: AdapterShape, config: dict[str, object]
) -> None:
    """Write adapter_config.json and adapter_model.safetensors. Raises TrainingError."""
    import torch
    from safetensors.torch import save_file

    dtype: torch.dtype = getattr(torch, shape.stored_dtype)
    stored = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    bad = [name for name, tensor in stored.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TrainingError(f"{len(bad)} tensors are not finite as {dtype}, first {bad[0]}")
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, default=_jsonable)
    (folder / "adapter_config.json").write_text(text + "\n")


def _load_ours(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    from .attached import Attached

    assert isinstance(model, Attached)
    try:
        model.adapter.load(tensors)
    except (ValueError, RuntimeError) as error:  # other names, other shapes
        raise TrainingError(f"the adapter to start from has another shape: {error}") from error


def _balance(model: nn.Module) -> Tensor:
    loss: Tensor = model.auxiliary_loss()  # type: ignore[operator]
    return loss


FAMILIES: dict[str, TrainableFamily] = {
    "lora": TrainableFamily(_attach_lora, _save_lora, _load_lora),
    "mixlora": TrainableFamily(_attach_mixlora, _save_ours, _load_ours, extra_loss=_balance),
    "block-lora": TrainableFamily(_attach_block_lora, _save_ours, _load_ours),
}
