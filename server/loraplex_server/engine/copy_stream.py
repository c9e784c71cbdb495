"""The stream that copies adapters to the device while steps run."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["CopyStream"]


class CopyStream:
    """A CUDA stream of its own, so that no step waits behind a copy; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type != "cpu":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event | None:
        """Engine thread, when memory changes hands: kernels launched so far may still read it."""
        if self._stream is None:
            return None
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._stream.device))
        return mark

    def run(self, mark: torch.cuda.Event | None, copy: Callable[[], None]) -> None:
        """Loader thread: waits for the kernels before ``mark``, copies, and returns when done."""
        if self._stream is None or mark is None:
            copy()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            copy()
        self._stream.synchronize()
