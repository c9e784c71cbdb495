"""Checkpoints whose linears are quantised already: read as they are, never rounded again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from loraplex_kernels.quantized_weight import QuantizedWeight

from .errors import ModelError
from .quantized_formats import LinearParts, is_quantized, linear_reader
from .quantized_modules import install_quantized

__all__ = ["load_quantized", "plain_config", "quantization_config"]


def quantization_config(path: Path) -> dict[str, Any] | None:
    """What ``config.json`` says of quantised weights; None if they are plain."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # transformers says what is wrong with it
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) else None


def plain_config(path: Path) -> PretrainedConfig:
    """Of the model without a word of quantised weights, which are no matter of transformers'."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def load_quantized(
    path: Path, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model with its codes on ``device`` and everything else on the CPU, in ``dtype``.

    ``config``: see ``quantization_config``. Raises ModelError for a form that is not read, and for
    tensors that the model has no place for or does not get.
    """
    read = linear_reader(config)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{str(path)!r} has no safetensors file")
    plain: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    for name, parts in _modules_of(files):
        if not is_quantized(parts):
            plain |= {f"{name}.{leaf}" if name else leaf: t for leaf, t in parts.items()}
            continue
        try:
            quantized[name] = read(LinearParts(parts), dtype).to(device)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{name} of {str(path)!r} cannot be read: {error}") from error
        if "bias" in parts:
            plain[f"{name}.bias"] = parts["bias"]
    model = _empty_model(path, dtype)
    _fill(model, plain, quantized)
    install_quantized(model, quantized)
    return model


def _modules_of(files: list[Path]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each module's tensors, mapped from its files, by the last part of their names."""
    where: dict[str, dict[str, Path]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name, _, leaf = key.rpartition(".")
                where.setdefault(name, {})[leaf] = file
    for name, leaves in where.items():
        parts: dict[str, Tensor] = {}
        for file in dict.fromkeys(leaves.values()):
            with safe_open(file, "pt") as opened:
                parts |= {
                    leaf: opened.get_tensor(f"{name}.{leaf}" if name else leaf)
                    for leaf, place in leaves.items()
                    if place == file
                }
        yield name, parts


def _empty_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Its parameters have no values and, until they get some, take no memory."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(plain_config(path), dtype=dtype)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _fill(
    model: PreTrainedModel, plain: Mapping[str, Tensor], quantized: Mapping[str, QuantizedWeight]
) -> None:
    """Copies the plain tensors; every parameter must come from somewhere, and every tensor fit."""
    modules = dict(model.named_modules())
    for name, weight in quantized.items():
        module = modules.get(name)
        shape = None if not isinstance(module, nn.Linear) else tuple(module.weight.shape)
        if shape != weight.shape:
            raise ModelError(
                f"the checkpoint has a quantised {name} {list(weight.shape)}; the model has "
                f"{'no such linear' if shape is None else list(shape)}"
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    found = model.load_state_dict(dict(plain), strict=False)
    expected = {f"{name}.weight" for name in quantized} | tied
    missing = sorted(set(found.missing_keys) - expected)
    unexpected = [k for k in found.unexpected_keys if not k.endswith("rotary_emb.inv_freq")]
    if missing or unexpected:
        raise ModelError(
            "the quantised checkpoint does not fit its model: "
            + "; ".join(
                f"{word} {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
                for word, keys in (("it lacks", missing), ("no place for", unexpected))
                if keys
            )
        )
    model.tie_weights()
