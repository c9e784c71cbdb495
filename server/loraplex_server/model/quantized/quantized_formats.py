"""Formats of quantised linears: converts the tensors of a linear to a ``QuantizedWeight``.

    compressed-tensors   pack-quantized (4 and 8 bits), int-quantized (8), float-quantized (e4m3)
    fp8                  e4m3 with a scale for a tensor, an output or a block of 128 × 128
    gptq                 4 and 8 bits
    awq                  4 bits in the layout "gemm"

Codes are symmetric, except for zero points of four bits (awq, gptq). Activations keep 16 bits,
whatever the checkpoint says. Everything else is refused by name.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loraplex_kernels.formats.quantized_weight import (
    ZERO,
    QuantizedWeight,
    WeightFormat,
    pack_int4,
)
from loraplex_server.model.errors import ModelError

_REMEDY = "load the base's 16-bit weights and start with --quantization int8, int4 or fp8"
_LEAVES = {"weight_packed", "weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each four bits of a word
_FP8 = torch.float8_e4m3fn
_log = logging.getLogger(__name__)


class LinearParts(dict[str, Tensor]):
    """The tensors of one linear, by the last part of their names."""

    def __missing__(self, leaf: str) -> Tensor:
        raise KeyError(f"it has no {leaf}, only {', '.join(sorted(self))}")


ReadLinear = Callable[[LinearParts, torch.dtype], QuantizedWeight]


def linear_reader(config: Mapping[str, Any]) -> ReadLinear:
    method = str(config.get("quant_method", "compressed-tensors"))
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "fp8":
        return _read_fp8
    if method == "gptq":
        return _gptq(config)
    if method == "awq":
        return _awq(config)
    raise ModelError(
        f"the checkpoint is quantised as {method!r}, which is not one of compressed-tensors, fp8, "
        f"gptq and awq; {_REMEDY}"
    )


def _compressed_tensors(config: Mapping[str, Any]) -> ReadLinear:
    """Return the reader. All groups of linears must have the same scheme."""
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


def _read_packed(
    parts: LinearParts, bits: int, group_size: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Read weight_packed int32 [out, in · bits / 32]: codes + 2^(bits − 1), first one lowest."""
    if parts.get("weight_zero_point") is not None or parts.get("weight_g_idx") is not None:
        raise ValueError("it has zero points or an order of inputs of its own")
    n_out, in_features = (int(size) for size in parts["weight_shape"])
    offset = _unpack(parts["weight_packed"], bits)[:, :in_features]
    if offset.shape != (n_out, in_features):
        raise ValueError(f"weight_packed holds {tuple(offset.shape)}, not {(n_out, in_features)}")
    return _integers(offset, parts["weight_scale"], bits, group_size, dtype)


def _read_int8(parts: LinearParts, group_size: int, dtype: torch.dtype) -> QuantizedWeight:
    offset = (parts["weight"].to(torch.int16) + 128).to(torch.uint8)
    return _integers(offset, parts["weight_scale"], 8, group_size, dtype)


def _read_fp8(parts: LinearParts, dtype: torch.dtype) -> QuantizedWeight:
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


def _gptq(config: Mapping[str, Any]) -> ReadLinear:
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
    parts: LinearParts, bits: int, group_size: int, stored_zero: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Read qweight int32 [in · bits / 32, out], first input lowest, and scales [n_groups, out]."""
    offset = _unpack(parts["qweight"].t(), bits)
    order, zeros = parts.get("g_idx"), parts.get("qzeros")
    inputs = torch.arange(offset.shape[1])
    in_order = inputs // group_size if group_size > 0 else torch.zeros_like(inputs)
    if order is not None and not torch.equal(order.long(), in_order):
        raise ValueError("its inputs have an order of their own (g_idx)")
    if zeros is not None and bool((_unpack(zeros, bits) != stored_zero).any()):
        raise ValueError(f"it has zero points; symmetric codes are read; {_REMEDY}")
    return _integers(offset, parts["scales"].t(), bits, group_size, dtype)


def _awq(config: Mapping[str, Any]) -> ReadLinear:
    bits = config.get("bits", config.get("w_bit"))
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    where = f"the checkpoint is quantised as awq with {bits} bits in the layout {layout!r}"
    if bits != 4 or layout != "gemm":
        raise ModelError(f"{where}; 4 in 'gemm' are read; {_REMEDY}")
    group_size = int(config.get("group_size", config.get("q_group_size", -1)))
    return lambda parts, dtype: _read_awq(parts, group_size, dtype)


def _read_awq(parts: LinearParts, group_size: int, dtype: torch.dtype) -> QuantizedWeight:
    """Read W[n, k] = (code - zero) · scale: qweight int32 [in, out / 8], qzeros int32
    [n_groups, out / 8] and scales [n_groups, out]."""
    offset, zeros = (_awq_codes(parts[leaf]) for leaf in ("qweight", "qzeros"))
    scales = parts["scales"].t()
    if zeros.shape != scales.shape or offset.shape[0] != scales.shape[0]:
        raise ValueError(
            f"its codes are {tuple(offset.shape)}, zeros {tuple(zeros.shape)} and scales "
            f"{tuple(scales.shape)} of [out, in]"
        )
    return _integers(offset, scales, 4, group_size, dtype, zeros)


def _awq_codes(words: Tensor) -> Tensor:
    """Unpack int32 [n, out / 8] to uint8 [out, n]."""
    grouped = _unpack(words, 4).view(words.shape[0], -1, len(_AWQ_ORDER))
    in_order = torch.empty_like(grouped)
    in_order[:, :, list(_AWQ_ORDER)] = grouped
    return in_order.flatten(1).t().contiguous()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [n, m] to uint8 [n, m · 32 / bits], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)


def _integers(
    offset: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    zeros: Tensor | None = None,
) -> QuantizedWeight:
    """Convert codes + zero, uint8 [out, in], and scales [out], [out, n_groups] or one.

    ``zeros``: uint8 zero points of four bits, one for each scale; None if all are 2^(bits − 1).
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
        n_groups = -(-in_features // group_size)
        scales = scales.expand(n_out, n_groups).contiguous()
        zeros = None if zeros is None else zeros.expand(n_out, n_groups).contiguous()
    if zeros is not None and bool((zeros == ZERO).all()):
        zeros = None
    codes = pack_int4(offset, group_size)
    return QuantizedWeight(WeightFormat.INT4, codes, scales, in_features, group_size, dtype, zeros)


def is_quantized(parts: Mapping[str, Tensor]) -> bool:
    weight = parts.get("weight")
    coded = weight is not None and weight.dtype in (_FP8, torch.int8)
    return coded or bool(parts.keys() & _LEAVES)
