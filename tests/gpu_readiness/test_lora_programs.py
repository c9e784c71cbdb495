"""LoRA launches have programs for the tiles that a step fills, and few more."""

import pytest
import torch

from loraplex_kernels.formats.layout import LoraTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.segments import build_segments
from loraplex_kernels.triton.lora import lora_apply_triton
from tests.support.gpu.meta_device import META, meta_gpu

# The linears of a layer of Llama-3-8B.
_TARGETS = [
    LoraTarget("qkv", 4096, (4096, 1024, 1024)),
    LoraTarget("o", 4096, (4096,)),
    LoraTarget("gate_up", 4096, (14336, 14336)),
    LoraTarget("down", 14336, (4096,)),
]


@pytest.mark.parametrize(
    ("n_rows", "n_adapters", "host_knows", "most"),
    [
        (2048, 1, True, 1.1),
        (2048, 1, False, 1.5),  # a recorded step
        (2048, 16, True, 1.5),
        (512, 16, False, 1.5),
        (64, 64, False, 1.0),
        (32, 32, False, 1.0),
    ],
)
def test_most_programs_of_a_layer_have_work(
    n_rows: int, n_adapters: int, host_knows: bool, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the programs of all launches, and those that neighbouring rows of an adapter need."""
    with meta_gpu(monkeypatch) as gpu, torch.inference_mode():
        pool = LoraPool(_TARGETS, n_bytes=1 << 30, n_slots=512, dtype=torch.bfloat16, device=META)
        row_slots = torch.empty(n_rows, dtype=torch.int32, device=META)
        segments = build_segments(row_slots, n_slots=n_adapters if host_knows else None)
        gpu.take()
        for target in _TARGETS:
            x = torch.empty(n_rows, target.in_features, dtype=torch.bfloat16, device=META)
            out = torch.empty(n_rows, sum(target.out_features), dtype=torch.bfloat16, device=META)
            lora_apply_triton(x, pool.tables(target.name), segments, out=out)
        work = gpu.take()
    assert work.findings == []
    launched = useful = 0
    for _name, (n_tiles, *others), values in work.grids:
        beside = int(torch.Size(others).numel())
        needed = n_adapters * -(-n_rows // n_adapters // values["BLOCK_M"])
        launched += n_tiles * beside
        useful += needed * beside
    assert work.launches == ["shrink_kernel", "expand_kernel"] * len(_TARGETS)
    assert useful <= launched <= most * useful
