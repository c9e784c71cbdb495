"""FlashInfer's kernels behind ``paged_attention``, where that library is installed.

    plan, once a step, on the host: which program reads which pages       outside of CUDA graphs
    run, once a layer: q over the paged keys and values                   the same for all layers

A GPU's cache is FlashInfer's layout HND as it lies, so nothing is copied. What differs is the page
table: rows of pages here, one list of all pages and where each request's begin there. Lengths stay
on the host, where FlashInfer plans. Signatures are those of ``flashinfer-python`` 0.6 and 0.7.

A step may be planned while the one before runs. ``plan`` fills page-locked memory that its wrapper
keeps, and has it copied in order with the stream; all else that a plan changes lies on the device.
So that memory must not be filled again before that copy is through.
"""

from __future__ import annotations

import importlib
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import KernelUnavailable

__all__ = ["FlashInferAttention", "PlannedAttention"]

_WORKSPACE_BYTES = 128 << 20  # of partial results, as its documentation recommends
_N_PLANNERS = 2  # of a kind of layers, in turn: one step runs while the next is planned
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)


class _Kind(NamedTuple):
    """Layers of one kind share a plan."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None


class _Pages(NamedTuple):
    """A step as FlashInfer reads it. The indptr and the lengths lie on the host."""

    qo_indptr: Tensor  # int32 [n_requests + 1]
    kv_indptr: Tensor  # int32 [n_requests + 1], into ``kv_indices``
    kv_indices: Tensor  # int32 [n_pages of all requests], on the device
    last_page_len: Tensor  # int32 [n_requests], from 1 to page_size
    kv_lens: Tensor  # int32 [n_requests]


class _Planner(NamedTuple):
    """A wrapper, and the end of the copy out of its page-locked memory."""

    wrapper: Any
    copied: torch.cuda.Event | None  # None on a CPU


class FlashInferAttention:
    """Of one engine; engine thread only. Holds 128 MiB, and 16 MiB for each kind of layer."""

    def __init__(self, device: torch.device) -> None:
        """Raises KernelUnavailable where FlashInfer is not installed or cannot be imported."""
        try:
            module: Any = importlib.import_module("flashinfer")
        except Exception as error:  # of its own imports, too
            raise KernelUnavailable(f"flashinfer cannot be imported: {error}") from error
        self._wrapper = module.BatchPrefillWithPagedKVCacheWrapper
        self._device = device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._planners: dict[_Kind, deque[_Planner]] = {}  # the next to plan comes first

    @staticmethod
    def misfit(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        """Why a model on such a device is not served by it; None if it is."""
        if capability < (8, 0):
            return (
                f"the device has compute capability {'.'.join(map(str, capability))}, 8.0 is needed"
            )
        if dtype not in _DTYPES:
            return f"the model is {str(dtype).removeprefix('torch.')}, 16-bit floats are needed"
        if head_dim not in _HEAD_DIMS:
            return f"heads have {head_dim} dimensions, {', '.join(map(str, _HEAD_DIMS))} are known"
        return None

    def pages(
        self, n_queries: NDArray[Any], kv_lens: NDArray[Any], page_table: Tensor, page_size: int
    ) -> _Pages:
        """A step as FlashInfer reads it. Waits for nothing."""
        n_pages = -(-kv_lens // page_size)
        kv_indptr = _running_sum(n_pages)
        within = np.arange(kv_indptr[-1]) - np.repeat(kv_indptr[:-1], n_pages)
        flat = np.repeat(np.arange(len(kv_lens)) * page_table.shape[1], n_pages) + within
        places = self._on_host(flat.astype(np.int32)).to(self._device, non_blocking=True)
        return _Pages(
            self._on_host(_running_sum(n_queries)),
            self._on_host(kv_indptr),
            page_table.reshape(-1).index_select(0, places),
            self._on_host((kv_lens - (n_pages - 1) * page_size).astype(np.int32)),
            self._on_host(kv_lens.astype(np.int32)),
        )

    def planned(self, kind: _Kind, pages: _Pages) -> Any:
        """The wrapper of such layers, planned for this step.

        Waits only where the device is so far behind that it has not read the plan before the last.
        """
        planners = self._planners.setdefault(kind, deque())
        if len(planners) < _N_PLANNERS:
            planners.appendleft(self._new_planner())
        planner = planners[0]
        if planner.copied is not None and not planner.copied.query():  # type: ignore[no-untyped-call]
            planner.copied.synchronize()
        wrapper = planner.wrapper
        wrapper.plan(
            pages.qo_indptr,
            pages.kv_indptr,
            pages.kv_indices,
            pages.last_page_len,
            kind.n_heads,
            kind.n_kv_heads,
            kind.head_dim,
            kind.page_size,
            causal=True,
            sm_scale=kind.scale,
            window_left=-1 if kind.window is None else kind.window - 1,  # it does not count itself
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
            seq_lens=pages.kv_lens,  # else it makes its own, whose copy waits for the device
        )
        if planner.copied is not None:
            planner.copied.record(torch.cuda.current_stream(self._device))
        planners.rotate(-1)
        return wrapper

    def _new_planner(self) -> _Planner:
        copied = None
        if self._device.type != "cpu":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return _Planner(self._wrapper(self._workspace, "HND"), copied)

    def _on_host(self, values: NDArray[np.int32]) -> Tensor:
        """Page-locked beside a GPU, so that copies out of it are not waited for."""
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.pin_memory()


class PlannedAttention:
    """Attention of all layers of one step; planned when the first layer asks.

    ``n_queries``, ``kv_lens`` [n_requests], each ≥ 1, on the host; ``page_table`` int32
    [n_requests, n_pages], on the device: the one that the layers are given.
    """

    def __init__(
        self,
        library: FlashInferAttention,
        n_queries: NDArray[Any],
        kv_lens: NDArray[Any],
        page_table: Tensor,
    ) -> None:
        self._library = library
        self._lens = n_queries, kv_lens
        self._page_table = page_table
        self._pages: _Pages | None = None
        self._wrappers: dict[_Kind, Any] = {}

    def is_of(self, page_table: Tensor) -> bool:
        return page_table is self._page_table

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """``paged_attention`` of the step; ``q``, ``out`` [T, n_heads, D]."""
        _, n_kv_heads, page_size, head_dim = k_cache.shape
        kind = _Kind(q.shape[1], n_kv_heads, head_dim, page_size, q.dtype, scale, window, softcap)
        if kind not in self._wrappers:
            if self._pages is None:
                self._pages = self._library.pages(*self._lens, self._page_table, page_size)
            self._wrappers[kind] = self._library.planned(kind, self._pages)
        self._wrappers[kind].run(q, (k_cache, v_cache), out=out)


def _running_sum(values: NDArray[Any]) -> NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(values))).astype(np.int32)
