"""A second CUDA stream, for work that can run beside the first one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["CudaSideStream", "SideStream"]


class SideStream(Protocol):
    """Forks off the current stream at ``launch`` and joins it at ``join``. One thread.

    Memory that is used on both sides is allocated by the current stream before ``launch`` and kept
    until ``join``: the caching allocator then needs no word of the other stream.
    """

    def launch(self, work: Callable[[], None]) -> None:
        """Queues ``work`` behind what the current stream was given so far."""

    def join(self) -> None:
        """What the current stream is given from now on comes after all that was launched."""


class CudaSideStream:
    """Events alone, no host waits: a CUDA graph records the fork and the join."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def launch(self, work: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
