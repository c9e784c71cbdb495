"""FlashInfer's paged prefill and captured decode in plain torch, with its wheel's signatures.

Checks what the library states of its arguments: where they lie, dtypes, shapes, the layout HND.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class BatchPrefillWithPagedKVCacheWrapper:
    """A wrapper with the checks that ``flashinfer-python`` 0.7.4 documents for its arguments."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype is torch.uint8
        assert kv_layout == "HND"
        self.device = float_workspace_buffer.device
        self.n_plans = self.n_runs = 0
        made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        *,
        seq_lens: Tensor | None = None,  # without it the lengths are copied out of pageable memory
    ) -> None:
        assert seq_lens is not None
        n_pages = paged_kv_indptr.diff()
        assert torch.equal(seq_lens, (n_pages - 1) * page_size + paged_kv_last_page_len)
        for indptr in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len, seq_lens):
            assert indptr.device.type == "cpu"  # or planning waits for the device
            assert indptr.dtype is torch.int32
            assert indptr.is_contiguous()
        assert paged_kv_indices.device == self.device
        assert paged_kv_indices.dtype is torch.int32
        assert paged_kv_indices.shape == (int(paged_kv_indptr[-1]),)
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert int(paged_kv_last_page_len.min()) >= 1
        assert int(paged_kv_last_page_len.max()) <= page_size
        assert causal
        assert num_qo_heads % num_kv_heads == 0
        assert kv_data_type in (q_data_type, torch.float8_e4m3fn)
        self._pages = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._scores = (sm_scale or head_dim_qk**-0.5, window_left, logits_soft_cap or 0.0)
        self._dtype = q_data_type
        self.n_plans += 1

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        n_heads, n_kv_heads, head_dim, page_size = self._heads
        starts, firsts, indices, last = self._pages
        assert out is not None
        assert q.shape == out.shape == (int(starts[-1]), n_heads, head_dim)
        assert q.dtype is out.dtype is self._dtype
        assert q.stride(2) == 1
        assert out.is_contiguous()
        for cache in paged_kv_cache:
            assert cache.shape[1:] == (n_kv_heads, page_size, head_dim)
            assert cache.is_contiguous()
        self.n_runs += 1
        if q.is_meta:
            return out
        for r in range(len(last)):
            pages = indices[firsts[r] : firsts[r + 1]].long()
            n = (len(pages) - 1) * page_size + int(last[r])
            k, v = (c[pages].transpose(1, 2).flatten(0, 1)[:n].double() for c in paged_kv_cache)
            rows = slice(int(starts[r]), int(starts[r + 1]))
            out[rows] = self._attend(q[rows].double(), k, v).to(q.dtype)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale, window_left, soft_cap = self._scores
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        place = torch.arange(len(k) - len(q), len(k))[:, None]
        j = torch.arange(len(k))[None, :]
        hidden = j > place
        if window_left >= 0:
            hidden |= j < place - window_left
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class BatchDecodeWithPagedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """The wrapper of captured decode steps. ``run`` reads its buffers, as a replay does."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph
        assert use_tensor_cores
        assert backend == "fa2"  # "auto" may choose another kernel at a later plan
        buffers = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )
        for buffer in buffers:
            assert buffer is not None
            assert buffer.device == self.device
            assert buffer.dtype is torch.int32
        self._buffers = buffers

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor
    ) -> None:
        assert int_workspace_buffer.device == self.device

    def plan(  # type: ignore[override]
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        seq_lens: Tensor | None = None,
    ) -> None:
        starts, pages, last = self._buffers
        assert len(indptr) == len(starts)  # fixed
        assert len(indices) <= len(pages)
        super().plan(
            torch.arange(len(indptr), dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            causal=True,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            seq_lens=seq_lens,
        )
        starts.copy_(indptr, non_blocking=True)
        last.copy_(last_page_len, non_blocking=True)
        pages[: len(indices)].copy_(indices)
        self._pages = (self._pages[0], *self._buffers)


made: list[BatchPrefillWithPagedKVCacheWrapper] = []


def install_flashinfer(
    monkeypatch: pytest.MonkeyPatch,
) -> list[BatchPrefillWithPagedKVCacheWrapper]:
    """Replace the library by the stand-in. Returns the list of wrappers built from then on."""
    made.clear()
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper  # type: ignore[attr-defined]
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return made
