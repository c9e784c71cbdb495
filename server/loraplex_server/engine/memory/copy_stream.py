"""Copies that no step waits for: adapters to the device, and results back to the host."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class CopyStream:
    """A CUDA stream for copies, so that no step waits behind them; no stream on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type != "cpu":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event | None:
        """Mark the kernels launched so far, which may still read the memory. Engine thread."""
        if self._stream is None:
            return None
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._stream.device))
        return mark

    def run(self, mark: torch.cuda.Event | None, copy: Callable[[], T]) -> T:
        """Return the result of ``copy``. It waits for the kernels before ``mark``. Loader thread.

        Memory that ``copy`` allocates belongs to this stream. Another load takes it only behind a
        mark that follows the last step that reads it.
        """
        if self._stream is None or mark is None:
            return copy()
        try:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(mark)
                return copy()
        finally:  # after an error, too: sources and targets of the copies are then free
            self._stream.synchronize()


class CopyBack:
    """A copy through page-locked memory, behind the work launched so far."""

    def __init__(self, source: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if not source.is_cuda:
            self._host = source.cpu()
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(torch.cuda.current_stream(source.device))

    def poll(self) -> Tensor | None:
        """Return the tensor on the host, or None if the copy is not done."""
        is_done = self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]
        return self._host if is_done else None

    def wait(self) -> Tensor:
        """Wait and return the tensor on the host. Raises the device's errors."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
