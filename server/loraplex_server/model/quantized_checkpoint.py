"""Checkpoints whose linears are quantised already: read as they are, never rounded again.

    compressed-tensors   pack-quantized (4 and 8 bits), int-quantized (8), float-quantized (e4m3)
    fp8                  e4m3 with a scale for a tensor, an output or a block of 128 × 128
    gptq                 4 and 8 bits

Symmetric codes alone. What a checkpoint says about rounding activations is not applied: activations
keep 16 bits. Everything else is refused with its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from loraplex_kernels.quantized_weight import QuantizedWeight, WeightFormat, pack_int4

from .errors import ModelError
from .quantized_modules import install_quantized

__all__ = ["load_quantized", "quantization_config"]

_REMEDY = "load the base's 16-bit weights and start with --quantization int8, int4 or fp8"
_LEAVES = {"weight_packed", "weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales"}
_FP8 = torch.float8_e4m3fn
_log = logging.getLogger(__name__)


def quantization_config(path: Path) -> dict[str, Any] | None:
    """What ``config.json`` says of quantised weights; None if they are plain."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # transformers says what is wrong with it
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) else None


def load_quantized(
    path: Path, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model with its codes on ``device`` and everything else on the CPU, in ``dtype``.

    ``config``: see ``quantization_config``. Raises ModelError for a form that is not read, and for
    tensors that the model has no place for or does not get.
    """
    read = _reader(config)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{str(path)!r} has no safetensors file")
    plain: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    for name, parts in _modules_of(files):
        if not _is_quantized(parts):
            plain |= {f"{name}.{leaf}" if name else leaf: t for leaf, t in parts.items()}
            continue
        try:
            quantized[name] = read(_Parts(parts), dtype).to(device)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{name} of {str(path)!r} cannot be read: {error}") from error
        if "bias" in parts:
            plain[f"{name}.bias"] = parts["bias"]
    model = _empty_model(path, dtype)
    _fill(model, plain, quantized)
    install_quantized(model, quantized)
    return model


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of one linear, by the last part of their names."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, leaf: str) -> Tensor:
        found = self.tensors.get(leaf)
        if found is None:
            raise KeyError(f"it has no {leaf}, only {', '.join(sorted(self.tensors))}")
        return found

    def get(self, leaf: str) -> Tensor | None:
        return self.tensors.get(leaf)


Read = Callable[[_Parts, torch.dtype], QuantizedWeight]


def _reader(config: Mapping[str, Any]) -> Read:
    method = str(config.get("quant_method", "compressed-tensors"))
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "fp8":
        return _read_fp8
    if method == "gptq":
        return _gptq(config)
    why = "has zero points" if method == "awq" else "is not one of compressed-tensors, fp8 and gptq"
    raise ModelError(f"the checkpoint is quantised as {method!r}, which {why}; {_REMEDY}")


def _compressed_tensors(config: Mapping[str, Any]) -> Read:
    """Every group of linears with the same scheme."""
    form = str(config.get("format"))
    groups = list(dict(config.get("config_groups") or {}).values())
    schemes = [dict(group.get("weights") or {}) for group in groups]
    where = f"the checkpoint is quantised as compressed-tensors {form!r}"
    if config.get("sparsity_config") and config["sparsity_config"].get("format") != "dense":
        raise ModelError(f"{where} and sparse, which is not read; {_REMEDY}")
    if form not in ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"):
        raise ModelError(f"{where}, which is not read; {_REMEDY}")
    if len(schemes) != 1:
        raise ModelError(f"{where} with {len(schemes)} schemes; one is read; {_REMEDY}")
    (scheme,) = schemes
    bits, kind = scheme.get("num_bits"), scheme.get("type")
    if not scheme.get("symmetric", True):
        raise ModelError(f"{where} with zero points; symmetric codes are read; {_REMEDY}")
    if scheme.get("actorder") in ("group", "dynamic"):
        raise ModelError(f"{where} with inputs in an order of their own (actorder); {_REMEDY}")
    if any(group.get("input_activations") for group in groups):
        _log.info("%s: its activations stay in 16 bits, which rounds less than it asks for", where)
    if kind == "float" and bits == 8:
        return _read_fp8
    if kind == "int" and bits in (4, 8):
        group_size = int(scheme.get("group_size") or -1)
        if form == "pack-quantized":
            return lambda parts, dtype: _read_packed(parts, int(bits), group_size, dtype)
        if bits == 8:
            return lambda parts, dtype: _read_int8(parts, group_size, dtype)
    raise ModelError(f"{where} with {bits} bits of {kind}, which is not read; {_REMEDY}")


def _read_packed(parts: _Parts, bits: int, group_size: int, dtype: torch.dtype) -> QuantizedWeight:
    """weight_packed int32 [out, in · bits / 32], codes + 2^(bits − 1), the first lowest."""
    if parts.get("weight_zero_point") is not None or parts.get("weight_g_idx") is not None:
        raise ValueError("it has zero points or an order of inputs of its own")
    n_out, in_features = (int(size) for size in parts["weight_shape"])
    offset = _unpack(parts["weight_packed"], bits)[:, :in_features]
    if offset.shape != (n_out, in_features):
        raise ValueError(f"weight_packed holds {tuple(offset.shape)}, not {(n_out, in_features)}")
    return _integers(offset, parts["weight_scale"], bits, group_size, dtype)


def _read_int8(parts: _Parts, group_size: int, dtype: torch.dtype) -> QuantizedWeight:
    offset = (parts["weight"].to(torch.int16) + 128).to(torch.uint8)
    return _integers(offset, parts["weight_scale"], 8, group_size, dtype)


def _read_fp8(parts: _Parts, dtype: torch.dtype) -> QuantizedWeight:
    codes = parts["weight"]
    if codes.dtype is not _FP8:
        raise ValueError(f"its weight is {codes.dtype}; {_FP8} is read")
    if bool(codes.float().isnan().any()):
        raise ValueError("its weight is not finite")
    scale = parts.get("weight_scale_inv")
    scale = parts["weight_scale"] if scale is None else scale
    n_out, in_features = codes.shape
    scales, group_size = scale.float(), in_features
    if scale.dim() < 2 or scale.shape[1] == 1:
        scales = scales.reshape(-1, 1).expand(n_out, 1) if scale.numel() == 1 else scales
        scales = scales.reshape(n_out, 1)
    else:
        group_size = 128
        if scale.shape != (-(-n_out // 128), -(-in_features // 128)):
            raise ValueError(f"scales {tuple(scale.shape)}: blocks of 128 × 128 are read")
        scales = scales.repeat_interleave(128, dim=0)[:n_out]
    code_bytes = codes.view(torch.uint8)
    return QuantizedWeight(
        WeightFormat.FP8, code_bytes, scales.contiguous(), in_features, group_size, dtype
    )


def _gptq(config: Mapping[str, Any]) -> Read:
    bits = config.get("bits")
    where = f"the checkpoint is quantised as gptq with {bits} bits"
    if bits not in (4, 8):
        raise ModelError(f"{where}; 4 and 8 are read; {_REMEDY}")
    if config.get("desc_act"):
        raise ModelError(f"{where} and inputs in an order of their own (desc_act); {_REMEDY}")
    stored_zero = 2 ** (bits - 1) - (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    group_size = int(config.get("group_size", -1))
    return lambda parts, dtype: _read_gptq(parts, int(bits), group_size, stored_zero, dtype)


def _read_gptq(
    parts: _Parts, bits: int, group_size: int, stored_zero: int, dtype: torch.dtype
) -> QuantizedWeight:
    """qweight int32 [in · bits / 32, out], the first input lowest; scales [n_groups, out]."""
    offset = _unpack(parts["qweight"].t(), bits)
    order, zeros = parts.get("g_idx"), parts.get("qzeros")
    inputs = torch.arange(offset.shape[1])
    in_order = inputs // group_size if group_size > 0 else torch.zeros_like(inputs)
    if order is not None and not torch.equal(order.long(), in_order):
        raise ValueError("its inputs have an order of their own (g_idx)")
    if zeros is not None and bool((_unpack(zeros, bits) != stored_zero).any()):
        raise ValueError(f"it has zero points; symmetric codes are read; {_REMEDY}")
    return _integers(offset, parts["scales"].t(), bits, group_size, dtype)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] → uint8 [n, m · 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)


def _integers(
    offset: Tensor, scale: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Of codes + 2^(bits − 1), uint8 [out, in], and scales [out], [out, n_groups] or one.

    ``group_size`` below 1: an output has one scale.
    """
    n_out, in_features = offset.shape
    scales = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    scales = scales.expand(n_out, scales.shape[1]).contiguous()
    n_groups = scales.shape[1]
    if n_groups == 1:
        group_size = in_features
    elif group_size not in (32, 64, 128):
        raise ValueError(f"groups of {group_size} inputs; 32, 64 and 128 are read")
    if bits == 8:
        codes = (offset.to(torch.int16) - 128).to(torch.int8)
        return QuantizedWeight(WeightFormat.INT8, codes, scales, in_features, group_size, dtype)
    if n_groups == 1:  # an output's scale is that of all its groups
        group_size = 128 if in_features % 128 == 0 else 64
        scales = scales.expand(n_out, -(-in_features // group_size)).contiguous()
    codes = pack_int4(offset, group_size)
    return QuantizedWeight(WeightFormat.INT4, codes, scales, in_features, group_size, dtype)


def _is_quantized(parts: Mapping[str, Tensor]) -> bool:
    weight = parts.get("weight")
    coded = weight is not None and weight.dtype in (_FP8, torch.int8)
    return coded or bool(parts.keys() & _LEAVES)


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
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
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
