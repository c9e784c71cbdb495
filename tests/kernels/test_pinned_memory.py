"""Page-locked memory of adapters: true sizes, few allocations, and no tensor over another."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from loraplex_kernels.lora import pinned_memory
from loraplex_kernels.lora.pinned_memory import SLAB_BYTES, PinnedMemory


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The page-locked allocations, which are plain memory where there is no GPU."""
    sizes: list[int] = []
    empty = torch.empty

    def counted(n: int, *, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        if pin_memory:
            sizes.append(n * dtype.itemsize)
        return empty(n, dtype=dtype)

    monkeypatch.setattr(pinned_memory.torch, "empty", counted)
    return sizes


def test_adapters_take_their_own_bytes_of_few_slabs(allocated: list[int]) -> None:
    """Each of 84 MB; as allocations of their own, rounded to powers of two, they take 128 MiB."""
    pinned = PinnedMemory()
    images = [pinned.empty(42_000_000, torch.bfloat16) for _ in range(24)]
    n_bytes = sum(image.nbytes for image in images)
    assert allocated == [SLAB_BYTES] * 8
    assert pinned.bytes_total < 1.1 * n_bytes
    assert 1.5 * n_bytes < 24 * (128 << 20)


def test_a_large_image_has_a_slab_whose_rest_serves_others(allocated: list[int]) -> None:
    pinned = PinnedMemory()
    large, small = pinned.empty(SLAB_BYTES + 1, torch.uint8), pinned.empty(1 << 20, torch.float32)
    assert allocated == [2 * SLAB_BYTES]
    assert large.numel() == SLAB_BYTES + 1
    assert small.shape == (1 << 20,)
    assert pinned.empty(0, torch.bfloat16).shape == (0,)


def test_memory_is_reused_once_no_view_is_left(
    allocated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slab_bytes = 1 << 20
    monkeypatch.setattr(pinned_memory, "SLAB_BYTES", slab_bytes)
    pinned = PinnedMemory()
    for _ in range(4):
        view = pinned.empty(slab_bytes // 4, torch.bfloat16)[5:9]
        view.fill_(3)
        beside = pinned.empty(slab_bytes // 4, torch.bfloat16)
        beside.fill_(7)
        assert view.tolist() == [3.0] * 4
        del view, beside
        gc.collect()
    assert allocated == [slab_bytes]


def test_threads_never_share_memory(allocated: list[int]) -> None:
    pinned = PinnedMemory()

    def churn(seed: int) -> None:
        dice, held = random.Random(seed), dict[int, Tensor]()
        for turn in range(300):
            value = seed * 1000 + turn
            held[value] = pinned.empty(dice.randrange(1, 5000), torch.int32).fill_(value)
            if len(held) > 6:
                value = dice.choice(list(held))
                assert bool((held.pop(value) == value).all())
        assert all(bool((tensor == value).all()) for value, tensor in held.items())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(churn, range(8)))
    assert allocated == [SLAB_BYTES]
