"""Engines of a CPU whose steps overlap, as a GPU's do.

The device is a CPU that samples as a GPU does: its tokens go to the next step before the host has
looked at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from loraplex_server.engine import build
from loraplex_server.engine.device_sampler import DeviceSampler
from loraplex_server.engine.engine_loop import EngineLoop
from loraplex_server.engine.model_runner import ModelRunner

__all__ = ["Watched", "overlapping"]


@dataclass
class Watched:
    """What the runner was told to do, and how often it still ran then."""

    n_started: int = 0
    n_finished: int = 0
    n_overlapped: int = 0  # starts while a step ran
    failing: set[int] = field(default_factory=set)  # of the finishes, by number


@contextmanager
def overlapping() -> Iterator[Watched]:
    """Of all engines that are built within."""
    watched = Watched()
    begin, start, finish = ModelRunner.__init__, ModelRunner.start, ModelRunner.finish

    def init(self: ModelRunner, base: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, base, *args, **kwargs)
        self._device_sampler = DeviceSampler(
            base.vocab_size, base.eos_token_ids, torch.device("cpu")
        )

    def started(self: ModelRunner, *args: Any) -> Any:
        step = start(self, *args)
        watched.n_overlapped += watched.n_started > watched.n_finished
        watched.n_started += 1
        return step

    def finished(self: ModelRunner, step: Any) -> Any:
        watched.n_finished += 1
        if watched.n_finished in watched.failing:
            raise RuntimeError("the device says that an earlier launch failed")
        return finish(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "__init__", init)
        patch.setattr(ModelRunner, "start", started)
        patch.setattr(ModelRunner, "finish", finished)
        patch.setattr(build, "EngineLoop", _overlapping)
        yield watched


def _overlapping(*args: Any, **kwargs: Any) -> EngineLoop:
    return EngineLoop(*args, **kwargs | {"overlaps": True})
