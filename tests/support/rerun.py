"""Recorded steps on a CPU: the replay is the work itself, over what the fixed tensors hold then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from transformers import PreTrainedModel

from loraplex_server.engine import build
from loraplex_server.engine.engine import Engine
from tests.support.engines import running_engine

__all__ = ["Rerun", "engine_with", "replays"]


class Rerun:
    """Records nothing."""

    def __init__(self) -> None:
        self.n_recorded = 0
        self.n_replayed = 0
        self.n_replayed_of_pieces = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.n_recorded += 1
        is_piece = getattr(work, "func", None).__name__ == "_run_piece"

        def replay() -> None:
            self.n_replayed += 1
            self.n_replayed_of_pieces += is_piece
            work()

        return replay


def replays(recorder: Rerun, n_pieces: int) -> int:
    """Steps: of each size what is recorded whole is replayed once, the others piece by piece."""
    whole = recorder.n_replayed - recorder.n_replayed_of_pieces
    return whole + recorder.n_replayed_of_pieces // n_pieces


@contextmanager
def engine_with(
    recorder: Callable[[Callable[[], None]], Callable[[], None]],
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    **changes: object,
) -> Iterator[Engine]:
    """``changes`` are fields of the config."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "_recorder", lambda config, device: recorder)
        with running_engine(model, **{"max_batch_size": 11, **changes}) as engine:
            yield engine
