"""All ranks of a base in one process, a thread each: a stand-in for a group of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.layers.tensor_parallel import Shard
from loraplex_server.model.loading.shard_loader import Checkpoint

_T = TypeVar("_T")


class ThreadGroup:
    """Sums in the order of ranks. ``n_reduced`` counts rank 0's sums."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Tensor | None] = [None] * size
        self.n_reduced = 0

    def of(self, rank: int) -> _Rank:
        return _Rank(self, rank)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What all ranks gave."""
        self._slots[rank] = x.clone()
        self._barrier.wait()
        found = [slot for slot in self._slots if slot is not None]
        self._barrier.wait()
        return found


class _Rank:
    """A ``Collective``."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def all_reduce(self, x: Tensor) -> None:
        self._group.n_reduced += self._rank == 0
        x.copy_(torch.stack(self._group.exchange(self._rank, x)).sum(0))

    def broadcast(self, x: Tensor) -> None:
        x.copy_(self._group.exchange(self._rank, x)[0])

    def gather(self, x: Tensor) -> list[Tensor]:
        found = self._group.exchange(self._rank, x)
        return found if self._rank == 0 else []


class _NobodyElse:
    """``OtherRanks`` of a rank 0 whose others are called by the test."""

    def check(self) -> None: ...

    def attach_kv(self, n_pages: int, page_size: int) -> None: ...

    def write_prefix(self, slots: Tensor, whole: Tensor) -> None: ...

    @contextmanager
    def step(self, step: ForwardContext, embeddings: Tensor) -> Iterator[None]:
        yield

    @contextmanager
    def head(self, x: Tensor) -> Iterator[None]:
        yield


def load_ranks(
    path: Path, size: int, group: ThreadGroup, quantization: WeightFormat | None = None
) -> list[BaseModel]:
    checkpoint = Checkpoint(path, size, quantization)
    return [
        BaseModel(
            checkpoint.load(rank, dtype=torch.float32, device=torch.device("cpu")),
            "tiny",
            self_check=False,
            shard=Shard(
                checkpoint.layout, rank, group.of(rank), _NobodyElse() if rank == 0 else None
            ),
        )
        for rank in range(size)
    ]


def run_ranks(size: int, work: Callable[[int], _T]) -> list[_T]:
    """``work`` of every rank at once."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, range(size)))
