"""All decoder layers of a step in one native call: no Python between two operators.

What it runs is what ``loraplex_server.model.fused_decoder`` runs layer by layer: the same functions
in the same order, so the same bits. A call lets go of Python's lock once, for the whole step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.layout import LoraSegments
from loraplex_kernels.ops import PreparedTarget
from loraplex_kernels.quantized_linear import BaseLinear

from .functions import bind
from .lora import SEGMENT_ERRORS, NativeLora, describe_segments
from .model_ops import dtype_code, is_plain, takes_cache, takes_heads, takes_norm
from .structs import (
    DecoderLayerStruct,
    DecoderLinearStruct,
    DecoderStepStruct,
    DecoderStruct,
)

__all__ = ["DecoderLayer", "DecoderLinear", "DecoderRows", "LogitsRows", "NativeDecoder", "Norm"]

_LINE_BYTES = 64
_GATE_STEP = 16  # columns of the activation
_NO_MLPS: Mapping[int, Callable[[Tensor], Tensor]] = {}


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm without offset."""

    weight: Tensor  # [width]
    eps: float


@dataclass(frozen=True, slots=True)
class DecoderLinear:
    """A packed linear of the base and its target in the adapter pool, None without a pool."""

    packed: BaseLinear
    lora: PreparedTarget | None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Norm, attention, norm, SiLU-gated MLP, both on the residual stream."""

    input_norm: Norm
    qkv: DecoderLinear
    keys: Tensor  # of the paged cache, see ``model_ops_reference``
    values: Tensor
    scale: float
    window: int | None
    out: DecoderLinear
    mlp_norm: Norm
    gate_up: DecoderLinear
    down: DecoderLinear

    @property
    def linears(self) -> tuple[DecoderLinear, DecoderLinear, DecoderLinear, DecoderLinear]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """Positions and pages of a step's rows, as in ``rope_and_cache`` and ``paged_attention``."""

    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]
    page_table: Tensor  # int32 [n_requests, max_pages]
    query_starts: Tensor  # int32 [n_requests + 1]
    kv_lens: Tensor  # int32 [n_requests]

    def are_plain(self) -> bool:
        """Whether native code may walk them."""
        return (
            is_plain(self.positions, torch.int64)
            and is_plain(self.slot_mapping, torch.int64)
            and is_plain(self.query_starts, torch.int32)
            and is_plain(self.kv_lens, torch.int32)
            and self.page_table.dtype is torch.int32
            and self.page_table.stride(1) == 1
        )


@dataclass(frozen=True, slots=True)
class LogitsRows:
    """The rows of a step whose hidden states are asked for."""

    indices: Tensor  # int64 [n_logits], ascending, on the device of the rows
    segments: LoraSegments | None  # of these rows, counted from 0


class NativeDecoder:
    """The layers bound to their memory, which it keeps alive. One thread at a time."""

    def __init__(
        self, layers: Sequence[DecoderLayer], norm: Norm, cos: Tensor, sin: Tensor, n_heads: int
    ) -> None:
        """``cos``, ``sin`` float32 [n_positions, head_dim]. Ask ``serves`` first."""
        first = layers[0]
        self._layers = tuple(layers)
        self._norm, self._cos, self._sin = norm, cos, sin
        self._dtype = first.qkv.packed.dtype
        n_kv_heads, page_size, head_dim = _cache_shape(first.keys)
        self._widths = (  # of y, qkv, heads, gate_up, act
            first.qkv.packed.in_features,
            first.qkv.packed.n_out,
            n_heads * head_dim,
            first.gate_up.packed.n_out,
            first.down.packed.in_features,
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._bound: list[NativeLora | None] = [None] * (4 * len(layers))
        self._described = (DecoderLayerStruct * len(layers))(
            *(_describe(layer) for layer in layers)
        )
        code = dtype_code(self._dtype)
        assert code is not None
        self._decoder = DecoderStruct(
            ctypes.addressof(self._described),
            len(layers),
            norm.weight.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            n_heads,
            n_kv_heads,
            head_dim,
            page_size,
            code,
            norm.eps,
        )
        self._address = ctypes.addressof(self._decoder)

    @staticmethod
    def serves(
        layers: Sequence[DecoderLayer], norm: Norm, cos: Tensor, sin: Tensor, n_heads: int
    ) -> bool:
        """Whether native code can run these layers: dtype, layouts and sizes."""
        if not layers:
            return False
        dtype = layers[0].qkv.packed.dtype
        n_kv_heads, page_size, head_dim = _cache_shape(layers[0].keys)
        ff = layers[0].down.packed.in_features
        return (
            dtype_code(dtype) is not None
            and is_plain(cos, torch.float32)
            and is_plain(sin, torch.float32)
            and cos.shape[1] == head_dim
            and takes_heads(head_dim, page_size)
            and ff % _GATE_STEP == 0
            and layers[0].qkv.packed.n_out == (n_heads + 2 * n_kv_heads) * head_dim
            and layers[0].gate_up.packed.out_features == (ff, ff)
            and takes_norm(norm.weight, dtype)
            and all(_is_native_layer(layer, dtype) for layer in layers)
        )

    def takes(self, hidden: Tensor, rows: DecoderRows) -> bool:
        """Whether it can run a step of these tensors."""
        return is_plain(hidden, self._dtype) and rows.are_plain()

    def __call__(
        self,
        hidden: Tensor,
        rows: DecoderRows,
        segments: LoraSegments | None,
        mlps: Mapping[int, Callable[[Tensor], Tensor]] = _NO_MLPS,
        logits_rows: LogitsRows | None = None,
    ) -> Tensor:
        """Embeddings [T, hidden_size] → normed hidden states. Changes ``hidden``, the residual.

        ``mlps`` are run in place of the MLPs of these layers, [T, hidden_size] → the same.
        With ``logits_rows`` (and no ``mlps``), these rows come out alone [n_logits, hidden_size];
        the others are only there for their keys and values. Raises IndexError for segments that do
        not fit the tables.
        """
        n_rows = hidden.shape[0]
        x = torch.empty_like(hidden)
        step = DecoderStepStruct(
            n_rows,
            hidden.data_ptr(),
            x.data_ptr(),
            *self._places(n_rows),
            rows.positions.data_ptr(),
            rows.slot_mapping.data_ptr(),
            rows.page_table.data_ptr(),
            rows.page_table.stride(0),
            rows.query_starts.data_ptr(),
            rows.kv_lens.data_ptr(),
            rows.kv_lens.shape[0],
        )
        step.n_logits = n_rows
        if segments is not None and segments.slots.shape[0] > 0:
            self._follow_tables()
            step.segments = describe_segments(segments)
        if logits_rows is not None:
            if mlps:
                raise ValueError("rows are only dropped where native code runs every MLP")
            step.logits_indices = logits_rows.indices.data_ptr()
            step.n_logits = logits_rows.indices.shape[0]
            if logits_rows.segments is not None:
                step.logits_segments = describe_segments(logits_rows.segments)
        pauses = bytes(index in mlps for index in range(len(self._layers))) if mlps else None
        step.pauses = pauses
        at = self._run(step, 0)
        while at < len(self._layers):
            made = mlps[at](x)
            if not is_plain(made, self._dtype) or made.shape != x.shape:
                raise ValueError(f"the MLP of layer {at} made {made.dtype} {tuple(made.shape)}")
            step.mlp = made.data_ptr()
            at = self._run(step, at + 1)
        return x if logits_rows is None else x[: logits_rows.indices.shape[0]]

    def _run(self, step: DecoderStepStruct, first: int) -> int:
        at: int = bind("decoder", keep_gil=False)(self._address, ctypes.addressof(step), first)
        if at < 0:
            raise IndexError(f"the segments of the step: {SEGMENT_ERRORS[-at]}")
        return at

    def _places(self, n_rows: int) -> list[int]:
        """Addresses of the scratch tensors, each at a cache line, in memory that stays warm."""
        size = self._dtype.itemsize
        starts, end = [], 0
        for width in self._widths:
            starts.append(end)
            end += -(-n_rows * width * size // _LINE_BYTES) * _LINE_BYTES
        if self._scratch.numel() < end + _LINE_BYTES:
            self._scratch = torch.empty(end + _LINE_BYTES, dtype=torch.uint8)
        first = -(-self._scratch.data_ptr() // _LINE_BYTES) * _LINE_BYTES
        return [first + start for start in starts]

    def _follow_tables(self) -> None:
        """The pool replaces the tables of all its targets when a rank beyond them arrives."""
        first = self._layers[0].linears[0].lora
        if first is not None and first.native() is self._bound[0]:
            return
        for index, layer in enumerate(self._layers):
            described = self._described[index]
            for at, linear in enumerate(layer.linears):
                native = None if linear.lora is None else linear.lora.native()
                if native is not self._bound[4 * index + at]:
                    self._bound[4 * index + at] = native
                    part: DecoderLinearStruct = getattr(described, _LINEARS[at])
                    part.lora = None if native is None else native.address


def _cache_shape(keys: Tensor) -> tuple[int, int, int]:
    """(n_kv_heads, page_size, head_dim) of a cache."""
    _, n_kv_heads, page_size, head_dim = keys.shape
    return n_kv_heads, page_size, head_dim


def _is_native_layer(layer: DecoderLayer, dtype: torch.dtype) -> bool:
    return (
        all(
            linear.packed.native is not None
            and linear.packed.dtype is dtype
            and (linear.lora is None or linear.lora.dtype is dtype)
            for linear in layer.linears
        )
        and takes_norm(layer.input_norm.weight, dtype)
        and takes_norm(layer.mlp_norm.weight, dtype)
        and takes_cache(layer.keys, layer.values, dtype)
    )


def _describe(layer: DecoderLayer) -> DecoderLayerStruct:
    return DecoderLayerStruct(
        *(_describe_linear(linear.packed) for linear in layer.linears),
        layer.input_norm.weight.data_ptr(),
        layer.mlp_norm.weight.data_ptr(),
        layer.keys.data_ptr(),
        layer.values.data_ptr(),
        layer.window or 0,
        layer.input_norm.eps,
        layer.mlp_norm.eps,
        layer.scale,
    )


def _describe_linear(packed: BaseLinear) -> DecoderLinearStruct:
    native = packed.native
    assert native is not None
    return DecoderLinearStruct(
        native.address, native.bias_address, None, packed.in_features, packed.n_out
    )


_LINEARS = ("qkv", "out", "gate_up", "down")
