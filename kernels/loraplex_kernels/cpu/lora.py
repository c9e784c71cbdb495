"""The native LoRA operator. It changes ``out`` in place and accumulates in float32."""

import ctypes
import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import LoraSegments, LoraTables

from .functions import bind
from .model_ops import is_plain
from .native import library
from .structs import LoraSegmentsStruct, LoraTargetStruct

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
SEGMENT_ERRORS = {
    1: "a segment names an adapter slot beyond the tables",
    2: "a segment names a row beyond x",
    3: "the rows of a segment must ascend, each once",
    4: "a pair stands on a row beyond x",
    5: "the segments must hold every pair",
    6: "indptr must ascend from 0 or more to at most the number of indices",
}


class NativeWeights(NamedTuple):
    """A base linear as ``csrc/layers/linear.inc`` reads it. The owner keeps the memory alive."""

    address: int
    bias_address: int  # 0 = none
    light_rows: int  # up to this many rows a call keeps Python's lock


def serves(dtype: torch.dtype) -> bool:
    """Return True if the native operator supports this dtype here."""
    return dtype in _DTYPES and library() is not None


class NativeLora:
    """The tables of a target as native code reads them, which it keeps alive.

    A call costs some microseconds of Python. Make a new object when the pool replaces the tables.
    Reentrant.
    """

    def __init__(self, tables: LoraTables) -> None:
        self.target, self.tables = tables.target, tables
        self._dtype = tables.storage.dtype
        if not serves(self._dtype):
            raise ValueError(f"no native LoRA kernel for {self._dtype} here; ask serves() first")
        self._n_columns = sum(self.target.out_features)
        self._descriptor = _describe(tables)
        self.address = ctypes.addressof(self._descriptor)

    def __call__(self, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        """Apply ``segments`` of ``x`` [n_rows, in_features] to ``out`` [n_rows, Σ out_features].

        Rows may be strided.
        """
        if segments.slots.shape[0] == 0:
            return
        self._check(x, out)
        described = describe_segments(segments)
        failed = bind("lora_apply", keep_gil=False)(
            self.address,
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            x.shape[0],
            ctypes.addressof(described),
        )
        if failed:
            raise IndexError(f"{self.target.name}: {SEGMENT_ERRORS[failed]}")

    def over_base(
        self,
        function: Literal["linear_with_lora", "moe_gate_up", "moe_down"],
        packed: NativeWeights,
        x: Tensor,
        segments: LoraSegments,
        out: Tensor,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write the base product and add the segments' products, in one native call.

        The factors are fetched into the cache while the base product is computed. The functions of
        experts (``lora.experts``) get ``pairs``: the rows of the step int64, and the tensor of the
        pairs that they write (``moe_gate_up``) or read.
        """
        self._check(x, out)
        n_rows = x.shape[0]
        described = describe_segments(segments)
        of_pairs: tuple[int, ...] = ()
        if pairs is not None:
            rows, values = pairs
            ff = self._n_columns // 2  # gate and up become one activation
            self._check_pairs(rows, values, x.shape[1] if function == "moe_down" else ff)
            of_pairs = (rows.data_ptr(), rows.shape[0], values.data_ptr(), values.stride(0))
        failed = bind(function, keep_gil=n_rows <= packed.light_rows)(
            self.address,
            packed.address,
            packed.bias_address,
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            n_rows,
            ctypes.addressof(described),
            *of_pairs,
        )
        if failed:
            raise IndexError(f"{self.target.name}: {SEGMENT_ERRORS[failed]}")

    def _check(self, x: Tensor, out: Tensor) -> None:
        n_rows, in_features = x.shape
        if (
            x.dtype != self._dtype
            or out.dtype != self._dtype
            or in_features != self.target.in_features
            or out.shape != (n_rows, self._n_columns)
            or (x.stride(1) != 1 and in_features > 1)
            or (out.stride(1) != 1 and self._n_columns > 1)
        ):
            self._refuse(x, out)

    def _check_pairs(self, rows: Tensor, values: Tensor, width: int) -> None:
        if not is_plain(rows, torch.int64):
            raise ValueError(f"rows of pairs must be contiguous int64; got {rows.dtype}")
        if values.dtype != self._dtype or values.shape != (rows.shape[0], width):
            raise ValueError(
                f"{self.target.name} needs {self._dtype} [{rows.shape[0]}, {width}] for the"
                f" pairs; got {values.dtype} {tuple(values.shape)}"
            )
        if values.stride(1) != 1:
            raise ValueError(f"pairs need unit column stride; got {values.stride()}")

    def _refuse(self, x: Tensor, out: Tensor) -> None:
        raise ValueError(
            f"{self.target.name} needs {self._dtype} rows [n, {self.target.in_features}] →"
            f" [n, {self._n_columns}] with unit column stride; got {x.dtype} {tuple(x.shape)}"
            f" {x.stride()} → {out.dtype} {tuple(out.shape)} {out.stride()}"
        )


def describe_segments(segments: LoraSegments) -> LoraSegmentsStruct:
    """Describe the segments to native code. The caller keeps their tensors alive.

    Raises ValueError if dtypes, shapes or strides are not those of ``LoraSegments``. Native code
    checks the values.
    """
    slots, indptr, indices = segments.slots, segments.indptr, segments.indices
    weights = segments.weights
    if not (
        is_plain(slots, torch.int32)
        and is_plain(indptr, torch.int32)
        and is_plain(indices, torch.int32)
        and indptr.shape[0] == slots.shape[0] + 1
    ):
        raise ValueError(
            "slots [n], indptr [n + 1] and indices of segments must be contiguous int32; got "
            + ", ".join(
                f"{t.dtype} {tuple(t.shape)} {t.stride()}" for t in (slots, indptr, indices)
            )
        )
    if weights is not None and (
        not is_plain(weights, torch.float32) or weights.shape != indices.shape
    ):
        raise ValueError(
            f"weights of segments must be contiguous float32 {tuple(indices.shape)}; got "
            f"{weights.dtype} {tuple(weights.shape)} {weights.stride()}"
        )
    return LoraSegmentsStruct(
        slots.data_ptr(),
        indptr.data_ptr(),
        indices.data_ptr(),
        None if weights is None else weights.data_ptr(),
        slots.shape[0],
        indices.shape[0],
    )


def _describe(tables: LoraTables) -> LoraTargetStruct:
    target, storage = tables.target, tables.storage
    pointers = []
    for name in ("ranks", "a_pages", "b_pages", "scale", "bias"):
        table: Tensor = getattr(tables, name)
        expected = torch.int32 if name == "ranks" else torch.int64
        if table.dtype != expected or not table.is_contiguous():
            raise ValueError(f"{target.name}: table {name} must be {expected} and contiguous")
        pointers.append(table.data_ptr())
    n_slots, _, max_pages = tables.a_pages.shape
    return _descriptor(
        (storage.data_ptr(), *pointers),
        target.in_features,
        target.out_features,
        (max_pages, n_slots, _DTYPES[storage.dtype]),
    )


@functools.lru_cache(maxsize=4096)
def _descriptor(
    pointers: tuple[int, ...], in_features: int, widths: tuple[int, ...], rest: tuple[int, int, int]
) -> LoraTargetStruct:
    """A pure function of numbers, cached to make binding quick. It keeps no tensor alive."""
    array = (ctypes.c_int64 * len(widths))(*widths)
    struct = LoraTargetStruct(*pointers, ctypes.addressof(array), in_features, len(widths), *rest)
    struct.widths = array  # kept alive
    return struct
