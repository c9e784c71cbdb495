"""Engines on a CPU whose steps overlap as on a GPU.

The device is a CPU that samples as a GPU does: its tokens go to the next step before the host has
looked at them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from loraplex_server.engine.steps.model_runner import ModelRunner
from loraplex_server.engine.steps.step_mode import StepMode


@dataclass
class Watched:
    """Counts of the runner's steps, and of starts while another step ran."""

    n_started: int = 0
    n_finished: int = 0
    n_overlapped: int = 0  # starts while a step ran
    failing: set[int] = field(default_factory=set)  # of the finishes, by number


@contextmanager
def overlapping() -> Iterator[Watched]:
    """Make the steps of all engines that are built in the block overlap."""
    watched = Watched()
    start, finish = ModelRunner.start, ModelRunner.finish

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

    mode = StepMode(overlaps=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepMode, "of", lambda config, device: mode)
        patch.setattr(ModelRunner, "start", started)
        patch.setattr(ModelRunner, "finish", finished)
        yield watched
