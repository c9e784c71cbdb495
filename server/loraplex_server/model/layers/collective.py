"""The collective operations of a group of ranks: gloo on CPUs, NCCL on GPUs.

Groups are objects and not torch's global group, so a test can have several in one process.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

_TIMEOUT = timedelta(minutes=10)  # of one call; a dead rank is noticed at once


class Collective:
    """Operations that all ranks, processes on this machine, call in the same order.

    They raise RuntimeError if a rank is gone. Engine thread only.
    """

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        """Waits until all ranks have joined. ``meeting`` is a new file that all of them use."""
        store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
        self._rank = rank
        self._size = size
        self._group = _group(device, store, rank, size)
        self._broadcast = dist.BroadcastOptions()
        self._broadcast.rootRank = 0
        self._gather = dist.GatherOptions()
        self._gather.rootRank = 0
        self.all_reduce(torch.zeros(1, device=device))  # the first call connects

    def all_reduce(self, x: Tensor) -> None:
        """Replaces ``x`` by the sum over all ranks, with the same bits on each."""
        self._group.allreduce([x]).wait()

    def broadcast(self, x: Tensor) -> None:
        """Replaces ``x`` by the ``x`` of rank 0."""
        self._group.broadcast([x], self._broadcast).wait()

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks on rank 0, and [] elsewhere. Shapes are equal."""
        parts = [torch.empty_like(x) for _ in range(self._size)] if self._rank == 0 else []
        self._group.gather([parts] if parts else [], [x], self._gather).wait()
        return parts

    def abort(self) -> None:
        """Ends calls that wait for a dead rank. Any thread."""
        if isinstance(self._group, dist.ProcessGroupGloo):
            return  # its connections break with the process
        self._group.abort()


def _group(device: torch.device, store: Store, rank: int, size: int) -> Any:
    if device.type == "cpu":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._threads = 1
    else:
        options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    kind = dist.ProcessGroupGloo if device.type == "cpu" else dist.ProcessGroupNCCL
    return kind(store, rank, size, options)
