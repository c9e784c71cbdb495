"""The native LoRA operator: raw pointers in, ``out`` changed in place, float32 accumulation."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.layout import LoraSegments, LoraTables, LoraTarget

from .functions import bind
from .model_ops import is_plain
from .native import library
from .structs import LoraSegmentsStruct, LoraTargetStruct

__all__ = [
    "SEGMENT_ERRORS",
    "NativeLora",
    "NativeWeights",
    "describe_segments",
    "serves",
]

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
    """A base linear as ``csrc/linear.inc`` reads it. Its owner keeps the memory alive."""

    address: int
    bias_address: int  # 0 = none
    light_rows: int  # rows up to which a call is too short to let go of Python's lock


def serves(dtype: torch.dtype) -> bool:
    """Whether the native operator takes this dtype here (else: the reference)."""
    return dtype in _DTYPES and library() is not None


class NativeLora:
    """One target bound to its storage and tables: a call costs some microseconds of Python.

    Keeps them alive. Make a new one when the pool replaces the tables. Reentrant.
    """

    def __init__(self, storage: Tensor, target: LoraTarget, tables: LoraTables) -> None:
        if not serves(storage.dtype):
            raise ValueError(f"no native LoRA kernel for {storage.dtype} here; ask serves() first")
        self.storage, self.target, self.tables = storage, target, tables
        self._n_columns = sum(target.out_features)
        self._descriptor = _describe(storage, target, tables)
        self.address = ctypes.addressof(self._descriptor)

    def __call__(self, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        """``x`` [n_rows, in_features], ``out`` [n_rows, Σ out_features]; any row stride."""
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

    def linear_with_lora(
        self, packed: NativeWeights, x: Tensor, segments: LoraSegments, out: Tensor
    ) -> None:
        """Writes the base's product and adds the segments' products, in one native call.

        While the first is computed, the factors of the second come into the cache.
        """
        self._call("linear_with_lora", packed, x, out, segments)

    def moe_gate_up(
        self,
        packed: NativeWeights,
        x: Tensor,
        segments: LoraSegments,
        pair_rows: Tensor,
        out: Tensor,
        expert_act: Tensor,
    ) -> None:
        """As ``loraplex_kernels.experts.moe_gate_up``; writes ``out`` and ``expert_act``."""
        self._call("moe_gate_up", packed, x, out, segments, (pair_rows, expert_act))

    def moe_down(
        self,
        packed: NativeWeights,
        x: Tensor,
        segments: LoraSegments,
        pair_rows: Tensor,
        out: Tensor,
        pairs: Tensor,
    ) -> None:
        """As ``loraplex_kernels.experts.moe_down``; reads ``x`` and ``pairs``, writes ``out``."""
        self._call("moe_down", packed, x, out, segments, (pair_rows, pairs))

    def _call(
        self,
        name: str,
        packed: NativeWeights,
        x: Tensor,
        out: Tensor,
        segments: LoraSegments,
        pairs: tuple[Tensor, Tensor] | None = None,  # their rows of the step, the tensor of them
    ) -> None:
        self._check(x, out)
        n_rows = x.shape[0]
        described = describe_segments(segments)
        of_pairs: tuple[int, ...] = ()
        if pairs is not None:
            rows, values = pairs
            into = self._n_columns // 2  # gate and up become one activation
            self._check_pairs(rows, values, x.shape[1] if name == "moe_down" else into)
            of_pairs = (rows.data_ptr(), rows.shape[0], values.data_ptr(), values.stride(0))
        failed = bind(name, keep_gil=n_rows <= packed.light_rows)(
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
        dtype = self.storage.dtype
        if (
            x.dtype != dtype
            or out.dtype != dtype
            or in_features != self.target.in_features
            or out.shape != (n_rows, self._n_columns)
            or (x.stride(1) != 1 and in_features > 1)
            or (out.stride(1) != 1 and self._n_columns > 1)
        ):
            self._refuse(x, out)

    def _check_pairs(self, rows: Tensor, values: Tensor, width: int) -> None:
        if not is_plain(rows, torch.int64):
            raise ValueError(f"rows of pairs must be contiguous int64; got {rows.dtype}")
        if values.dtype != self.storage.dtype or values.shape != (rows.shape[0], width):
            raise ValueError(
                f"{self.target.name} needs {self.storage.dtype} [{rows.shape[0]}, {width}] for the"
                f" pairs; got {values.dtype} {tuple(values.shape)}"
            )
        if values.stride(1) != 1:
            raise ValueError(f"pairs need unit column stride; got {values.stride()}")

    def _refuse(self, x: Tensor, out: Tensor) -> None:
        raise ValueError(
            f"{self.target.name} needs {self.storage.dtype} rows [n, {self.target.in_features}] →"
            f" [n, {self._n_columns}] with unit column stride; got {x.dtype} {tuple(x.shape)}"
            f" {x.stride()} → {out.dtype} {tuple(out.shape)} {out.stride()}"
        )


def describe_segments(segments: LoraSegments) -> LoraSegmentsStruct:
    """Where native code finds the segments, whose tensors the caller keeps.

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


def _describe(storage: Tensor, target: LoraTarget, tables: LoraTables) -> LoraTargetStruct:
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
    """A pure function of numbers, cached so that binding anew is quick. Keeps no tensor alive."""
    array = (ctypes.c_int64 * len(widths))(*widths)
    made = LoraTargetStruct(*pointers, ctypes.addressof(array), in_features, len(widths), *rest)
    made.widths = array
    return made
