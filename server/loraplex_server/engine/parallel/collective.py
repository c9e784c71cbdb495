"""The collective operations of a group of ranks: gloo on CPUs, NCCL on GPUs.

A process group object of torch's, none of its globals: a test has several groups in a process.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

__all__ = ["ProcessCollective"]

_TIMEOUT = timedelta(minutes=10)  # of one call: a rank that is gone shows at once


class ProcessCollective:
    """A ``Collective`` of this process and others of this machine. Engine thread only."""

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        """Blocks until all ``size`` ranks have come to ``meeting``, a file that nobody made yet."""
        store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
        self._rank = rank
        self._size = size
        make = _gloo if device.type == "cpu" else _nccl
        self._group = make(store, rank, size)
        self._broadcast = dist.BroadcastOptions()
        self._broadcast.rootRank = 0
        self._gather = dist.GatherOptions()
        self._gather.rootRank = 0
        self.all_reduce(torch.zeros(1, device=device))  # connections are made at the first call

    def all_reduce(self, x: Tensor) -> None:
        """See ``Collective``."""
        self._group.allreduce([x]).wait()

    def broadcast(self, x: Tensor) -> None:
        """See ``Collective``."""
        self._group.broadcast([x], self._broadcast).wait()

    def gather(self, x: Tensor) -> list[Tensor]:
        """See ``Collective``."""
        parts = [torch.empty_like(x) for _ in range(self._size)] if self._rank == 0 else []
        self._group.gather([parts] if parts else [], [x], self._gather).wait()
        return parts

    def abort(self) -> None:
        """Ends calls that wait for a rank that is gone. Any thread."""
        if isinstance(self._group, dist.ProcessGroupGloo):
            return  # whose connections break with the process
        self._group.abort()


def _gloo(store: Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, size, options)
