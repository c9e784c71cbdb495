"""Measures the memory of the largest step on a GPU, before the rest is divided."""

import torch

from loraplex_server.engine.memory.device import release_cached_memory
from loraplex_server.engine.memory.memory_plan import MemoryProfile
from loraplex_server.model.base_model import BaseModel

_PAGE = 16


@torch.inference_mode()
def profile_memory(model: BaseModel, *, n_tokens: int, n_requests: int) -> MemoryProfile:
    """Run a step of ``n_tokens`` rows of the base with logits of ``n_requests``; return its memory.

    Needs a GPU, which is current, and waits for it. Adapters' workspaces, graphs and fragmentation
    are not measured: they use the memory that ``--gpu-memory-utilization`` leaves.
    """
    device = model.device
    torch.cuda.synchronize(device)
    release_cached_memory(device)
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    n_cached = _run(model, n_tokens, min(n_requests, n_tokens))
    torch.cuda.synchronize(device)
    step = torch.cuda.max_memory_allocated(device) - before - n_cached
    release_cached_memory(device)
    return MemoryProfile(total=total, taken=total - free, step=max(0, step))


def _run(model: BaseModel, n_tokens: int, n_requests: int) -> int:
    """Run the step and return the bytes of its KV cache."""
    device, step = model.device, model.step
    n_pages = -(-n_tokens // _PAGE)
    keys, values = model.new_kv(n_pages, _PAGE), model.new_kv(n_pages, _PAGE)
    model.attach_kv(keys, values)
    rows = torch.arange(n_tokens, device=device)
    step.positions = rows % model.max_positions
    step.slot_mapping = rows
    step.page_table = torch.arange(n_pages, dtype=torch.int32, device=device).unsqueeze(0)
    step.query_starts = torch.arange(2, dtype=torch.int32, device=device) * n_tokens
    step.kv_lens = torch.full((1,), n_tokens, dtype=torch.int32, device=device)
    step.logits_rows = None
    step.clear_adapters()
    hidden = model.forward(model.embed(torch.zeros_like(rows)))
    raw = model.head.packed(hidden[:n_requests])
    model.finish_logits(raw, torch.empty_like(raw, dtype=torch.float32))
    return sum(tensor.nbytes for tensor in (*keys, *values))
