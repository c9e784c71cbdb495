"""All decoder layers of a step in one native call, without Python between operators.

The call runs the functions that the server's ``FusedDecoder`` runs layer by layer, in the same
order, so results have the same bits. It releases Python's lock once, for the whole step.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.cpu.functions import bind
from loraplex_kernels.cpu.lora import SEGMENT_ERRORS, describe_segments
from loraplex_kernels.cpu.model_ops import (
    dtype_code,
    is_plain,
    takes_cache,
    takes_heads,
    takes_norm,
)
from loraplex_kernels.cpu.structs import (
    DecoderLayerStruct,
    DecoderLinearStruct,
    DecoderStepStruct,
    DecoderStruct,
)
from loraplex_kernels.formats.int8_cache import head_dim_of
from loraplex_kernels.formats.layout import LoraSegments
from loraplex_kernels.layers.base_linear import BaseLinear

from .ops import PreparedTarget

_LINE_BYTES = 64
_GATE_STEP = 16  # columns of the activation
_NO_MLPS: Mapping[int, Callable[[Tensor], Tensor]] = {}


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm without an offset."""

    weight: Tensor  # [width]
    eps: float


@dataclass(frozen=True, slots=True)
class DecoderLinear:
    """A packed linear of the base, and its target in the adapter pool (None without a pool)."""

    packed: BaseLinear
    lora: PreparedTarget | None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A layer: norm, attention, norm, SiLU-gated MLP, on the residual stream."""

    input_norm: Norm
    qkv: DecoderLinear
    keys: Tensor  # of the paged cache, see ``reference.model_ops``
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
    """Positions and pages of a step, as in ``rope_and_cache`` and ``paged_attention``."""

    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]
    page_table: Tensor  # int32 [n_requests, max_pages]
    query_starts: Tensor  # int32 [n_requests + 1]
    kv_lens: Tensor  # int32 [n_requests]

    def are_plain(self) -> bool:
        """Return True if native code can read the tensors."""
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
    """The rows of a step whose hidden states are needed."""

    indices: Tensor  # int64 [n_logits], ascending, on the device of the rows
    segments: LoraSegments | None  # of these rows, counted from 0


class NativeDecoder:
    """Decoder layers bound to their memory, which they keep alive. One thread at a time."""

    def __init__(
        self, layers: Sequence[DecoderLayer], norm: Norm, cos: Tensor, sin: Tensor, n_heads: int
    ) -> None:
        """``cos``, ``sin``: float32 [n_positions, head_dim]. Call ``serves`` first."""
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
            int(first.keys.dtype is torch.int8),
            norm.eps,
        )
        self._address = ctypes.addressof(self._decoder)

    @staticmethod
    def serves(
        layers: Sequence[DecoderLayer], norm: Norm, cos: Tensor, sin: Tensor, n_heads: int
    ) -> bool:
        """Return True if native code supports the dtype, layouts and sizes of these layers."""
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
        """Return True if native code can run a step of these tensors."""
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

        ``mlps`` run in place of the MLPs of their layers. With ``logits_rows`` (and without
        ``mlps``) only these rows are returned, [n_logits, hidden_size]; other rows only write keys
        and values. Raises IndexError if segments do not fit the tables.
        """
        n_rows = hidden.shape[0]
        x = torch.empty_like(hidden)
        step = DecoderStepStruct(
            n_rows,
            hidden.data_ptr(),
            x.data_ptr(),
            *self._scratch_addresses(n_rows),
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
            step.segments = describe_segments(segments)
        if logits_rows is not None:
            if mlps:
                raise ValueError("logits_rows needs native code to run every MLP")
            step.logits_indices = logits_rows.indices.data_ptr()
            step.n_logits = logits_rows.indices.shape[0]
            if logits_rows.segments is not None:
                step.logits_segments = describe_segments(logits_rows.segments)
        pauses = bytes(index in mlps for index in range(len(self._layers))) if mlps else None
        step.pauses = pauses
        at = self._run(step, 0)
        while at < len(self._layers):
            out = mlps[at](x)
            if not is_plain(out, self._dtype) or out.shape != x.shape:
                raise ValueError(f"the MLP of layer {at} returned {out.dtype} {tuple(out.shape)}")
            step.mlp = out.data_ptr()
            at = self._run(step, at + 1)
        return x if logits_rows is None else x[: logits_rows.indices.shape[0]]

    def _run(self, step: DecoderStepStruct, first: int) -> int:
        at: int = bind("decoder", keep_gil=False)(self._address, ctypes.addressof(step), first)
        if at < 0:
            raise IndexError(f"segments of the step: {SEGMENT_ERRORS[-at]}")
        return at

    def _scratch_addresses(self, n_rows: int) -> list[int]:
        """Return the addresses of the scratch tensors, each at a cache line, in reused memory."""
        size = self._dtype.itemsize
        starts, end = [], 0
        for width in self._widths:
            starts.append(end)
            end += -(-n_rows * width * size // _LINE_BYTES) * _LINE_BYTES
        if self._scratch.numel() < end + _LINE_BYTES:
            self._scratch = torch.empty(end + _LINE_BYTES, dtype=torch.uint8)
        first = -(-self._scratch.data_ptr() // _LINE_BYTES) * _LINE_BYTES
        return [first + start for start in starts]


def _cache_shape(keys: Tensor) -> tuple[int, int, int]:
    """Return (n_kv_heads, page_size, head_dim) of a cache."""
    return keys.shape[1], keys.shape[2], head_dim_of(keys)


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
        *(_describe_linear(linear) for linear in layer.linears),
        layer.input_norm.weight.data_ptr(),
        layer.mlp_norm.weight.data_ptr(),
        layer.keys.data_ptr(),
        layer.values.data_ptr(),
        layer.window or 0,
        layer.input_norm.eps,
        layer.mlp_norm.eps,
        layer.scale,
    )


def _describe_linear(linear: DecoderLinear) -> DecoderLinearStruct:
    packed, native = linear.packed, linear.packed.native
    assert native is not None
    lora = None if linear.lora is None else linear.lora.native
    return DecoderLinearStruct(
        native.address,
        native.bias_address,
        None if lora is None else lora.address,
        packed.in_features,
        packed.n_out,
    )
