"""What the device found, on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CopyBack"]


class CopyBack:
    """A copy through page-locked memory, behind what the device was given so far."""

    def __init__(self, found: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if not found.is_cuda:
            self._host = found.cpu()
            return
        self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        self._host.copy_(found, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(torch.cuda.current_stream(found.device))

    def found(self) -> Tensor | None:
        """The tensor on the host; None if it is still on its way."""
        is_here = self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]
        return self._host if is_here else None

    def wait(self) -> Tensor:
        """The tensor on the host. Raises what the device raises."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
