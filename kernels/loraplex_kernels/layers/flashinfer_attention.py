"""FlashInfer's kernels behind ``paged_attention``, if that library is installed.

    plan, once a step, on the host: which program reads which pages       outside of CUDA graphs
    run, once a layer: q over the paged keys and values                   the same for all layers

A captured step runs the decode wrapper, planned into fixed buffers before each replay; other steps
run the prefill wrapper.

The cache of a GPU has FlashInfer's layout HND, so nothing is copied. Only the page table differs:
here it has a row of pages for each request, there it is one list of all pages with the start of
each request. Lengths stay on the host, where FlashInfer plans. The signatures are those of
``flashinfer-python`` 0.6 and 0.7.

A step may be planned while the previous step runs. ``plan`` fills page-locked memory of its
wrapper, which is copied in the order of the stream. All other results of a plan are on the device.
So the page-locked memory must not be filled again before its copy is done.
"""

import importlib
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.errors import KernelUnavailable

_WORKSPACE_BYTES = 128 << 20  # partial results, as FlashInfer's documentation recommends
_PLAN_BYTES = 8 << 20  # the size that FlashInfer gives a wrapper's plan
_N_PLANNERS = 2  # for each kind of layers: one step runs while the next is planned
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)


class _Kind(NamedTuple):
    """The parameters of a layer. Layers of one kind share a plan."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None

    @staticmethod
    def of(
        q: Tensor, k_cache: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> "_Kind":
        _, n_kv_heads, page_size, head_dim = k_cache.shape
        sizes = q.shape[1], n_kv_heads, head_dim, page_size
        return _Kind(*sizes, q.dtype, k_cache.dtype, scale, window, softcap)


class _Pages(NamedTuple):
    """A step as FlashInfer reads it. The indptr and the lengths are on the host."""

    qo_indptr: Tensor  # int32 [n_requests + 1]
    kv_indptr: Tensor  # int32 [n_requests + 1], into ``kv_indices``
    kv_indices: Tensor  # int32 [pages of all requests], on the device
    last_page_len: Tensor  # int32 [n_requests], from 1 to page_size
    kv_lens: Tensor  # int32 [n_requests]


class _Planner:
    """A wrapper, and the event after the copy of its page-locked memory."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper = wrapper
        self._device = device
        self._copied: torch.cuda.Event | None = None
        if device.type != "cpu":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def plan(self, kind: _Kind, pages: _Pages, *indptr: Tensor, **options: object) -> None:
        """Plan a step. Waits only if the device has not read the wrapper's last plan yet."""
        if self._copied is not None and not self._copied.query():  # type: ignore[no-untyped-call]
            self._copied.synchronize()
        self.wrapper.plan(
            *indptr,
            pages.kv_indptr,
            pages.kv_indices,
            pages.last_page_len,
            kind.n_heads,
            kind.n_kv_heads,
            kind.head_dim,
            kind.page_size,
            sm_scale=kind.scale,
            window_left=-1 if kind.window is None else kind.window - 1,  # without the query itself
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.kv_dtype,
            seq_lens=pages.kv_lens,  # else FlashInfer copies lengths and waits for the device
            **options,
        )
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))


class FlashInferAttention:
    """FlashInfer for one engine, used on the engine thread.

    Holds 128 MiB, and 24 MiB for each kind of layer.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises KernelUnavailable if FlashInfer is not installed or cannot be imported."""
        try:
            module: Any = importlib.import_module("flashinfer")
        except Exception as error:  # its own imports may fail, too
            raise KernelUnavailable(f"flashinfer cannot be imported: {error}") from error
        self._module = module
        self._device = device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._planners: dict[_Kind, deque[_Planner]] = {}  # the next planner first
        self._captured_plans: dict[_Kind, Tensor] = {}  # one captured step runs at a time

    @staticmethod
    def misfit(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        """Return the reason why FlashInfer cannot serve this model on this device, or None."""
        if capability < (8, 0):
            return f"the device has compute capability {'.'.join(map(str, capability))}, below 8.0"
        if dtype not in _DTYPES:
            return f"the model is {str(dtype).removeprefix('torch.')}, not a 16-bit float"
        if head_dim not in _HEAD_DIMS:
            return f"heads have {head_dim} dimensions, not {', '.join(map(str, _HEAD_DIMS))}"
        return None

    def pages(
        self, n_queries: NDArray[Any], kv_lens: NDArray[Any], page_table: Tensor, page_size: int
    ) -> _Pages:
        """Describe a step to FlashInfer. Does not wait for the device."""
        n_pages = -(-kv_lens // page_size)
        kv_indptr = _running_sum(n_pages)
        within = np.arange(kv_indptr[-1]) - np.repeat(kv_indptr[:-1], n_pages)
        flat = np.repeat(np.arange(len(kv_lens)) * page_table.shape[1], n_pages) + within
        index = self._on_host(flat.astype(np.int32)).to(self._device, non_blocking=True)
        return _Pages(
            self._on_host(_running_sum(n_queries)),
            self._on_host(kv_indptr),
            page_table.reshape(-1).index_select(0, index),
            self._on_host((kv_lens - (n_pages - 1) * page_size).astype(np.int32)),
            self._on_host(kv_lens.astype(np.int32)),
        )

    def planned(self, kind: _Kind, pages: _Pages) -> Any:
        """Return the wrapper for this kind of layer, planned for this step.

        Waits only if the device has not read the plan before the last one yet.
        """
        planners = self._planners.setdefault(kind, deque())
        if len(planners) < _N_PLANNERS:
            wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
            planners.appendleft(_Planner(wrapper, self._device))
        planner = planners[0]
        planner.plan(kind, pages, pages.qo_indptr, causal=True)
        planners.rotate(-1)
        return planner.wrapper

    def captured_planner(self, kind: _Kind, n_requests: int, indices: Tensor) -> _Planner:
        """Return a planner of captured decode steps of ``n_requests``.

        ``indices`` int32 on the device holds the pages of all requests.
        """
        indptr = torch.zeros(n_requests + 1, dtype=torch.int32, device=self._device)
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=torch.zeros_like(indptr[1:]),
            backend="fa2",
        )
        if kind not in self._captured_plans:
            plan = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=self._device)
            self._captured_plans[kind] = plan
        wrapper.reset_workspace_buffer(self._workspace, self._captured_plans[kind])
        return _Planner(wrapper, self._device)

    def _on_host(self, values: NDArray[np.int32]) -> Tensor:
        """Return a host tensor, page-locked for a GPU so that copies do not block."""
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.pin_memory()


class PlannedAttention:
    """The attention of all layers of one step, planned at the first layer.

    ``n_queries``, ``kv_lens`` [n_requests] are ≥ 1 and on the host. ``page_table`` int32
    [n_requests, n_pages] is on the device; layers must pass the same tensor.
    """

    def __init__(
        self,
        library: FlashInferAttention,
        n_queries: NDArray[Any],
        kv_lens: NDArray[Any],
        page_table: Tensor,
    ) -> None:
        self.kv_lens = kv_lens
        self._library = library
        self._n_queries = n_queries
        self._page_table = page_table
        self._pages: _Pages | None = None
        self._wrappers: dict[_Kind, Any] = {}

    def is_of(self, page_table: Tensor) -> bool:
        """Return True if the step has this page table."""
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
        """``paged_attention`` for this step. ``q`` and ``out`` are [T, n_heads, D]."""
        kind = _Kind.of(q, k_cache, scale, window, softcap)
        if kind not in self._wrappers:
            if self._pages is None:
                lens = self._n_queries, self.kv_lens
                self._pages = self._library.pages(*lens, self._page_table, kind.page_size)
            self._wrappers[kind] = self._library.planned(kind, self._pages)
        self._wrappers[kind].run(q, (k_cache, v_cache), out=out)


class CapturedAttention:
    """The attention of captured decode steps of one size, in ``PlannedAttention``'s place.

    ``page_table`` int32 [n_requests, n_pages] is that of the graph, ``indices`` int32
    [n_requests · n_pages] may be shared by sizes.
    """

    def __init__(self, library: FlashInferAttention, page_table: Tensor, indices: Tensor) -> None:
        self._library = library
        self._page_table, self._indices = page_table, indices
        self._planners: dict[_Kind, _Planner] = {}

    def is_of(self, page_table: Tensor) -> bool:
        """Return True: only the layers of the graph attend with it."""
        return True

    def plan(self, kv_lens: NDArray[Any]) -> None:
        """Plan the next replay, after its page table was written. Spare requests have length 1."""
        padded = np.ones(self._page_table.shape[0], dtype=np.int64)
        padded[: len(kv_lens)] = kv_lens
        pages: _Pages | None = None
        for kind, planner in self._planners.items():
            if pages is None:
                ones = np.ones_like(padded)
                pages = self._library.pages(ones, padded, self._page_table, kind.page_size)
            planner.plan(kind, pages)

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
        """``PlannedAttention.attend``. Layers run once before they are captured, which plans."""
        kind = _Kind.of(q, k_cache, scale, window, softcap)
        if kind not in self._planners:
            size = self._page_table.shape[0]
            self._planners[kind] = self._library.captured_planner(kind, size, self._indices)
            self.plan(np.ones(size, dtype=np.int64))
        self._planners[kind].wrapper.run(q, (k_cache, v_cache), out=out)


def _running_sum(values: NDArray[Any]) -> NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(values))).astype(np.int32)
