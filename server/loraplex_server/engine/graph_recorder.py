"""Records work of a GPU once, to launch it again as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["CudaRecorder", "Recorder", "Replay"]

Replay = Callable[[], None]


class Recorder(Protocol):
    def __call__(self, work: Callable[[], None]) -> Replay:
        """Records what ``work`` launches; the replay launches it again."""


class CudaRecorder:
    """Graphs that share one memory: only one runs at a time.

    What ``work`` allocates is another graph's as soon as nobody holds it: what has to outlast the
    replay lies in memory that was there before.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, work: Callable[[], None]) -> Replay:
        if self._stream is None:  # made on the engine thread, whose device is the model's
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside, current = self._stream, torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()  # not recorded: kernels are compiled, libraries set up
            # Not ``torch.cuda.graph``, which collects garbage before each of a thousand pieces.
            # Of this thread alone: loads go on beside it.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
            # Capturing runs nothing. Work that is recorded behind this reads what it leaves
            # (segments, in steps of pieces), and that must not be whatever was in memory.
            graph.replay()
        current.wait_stream(aside)
        return graph.replay
