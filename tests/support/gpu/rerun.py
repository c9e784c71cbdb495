"""Captured steps on a CPU: a replay runs the work again on the current buffers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.steps.step_mode import StepMode
from tests.support.servers.engines import running_engine


class Rerun:
    """Captures nothing and counts."""

    def __init__(self) -> None:
        self.n_captured = 0
        self.n_replayed = 0
        self.n_replayed_of_pieces = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.n_captured += 1
        is_piece = getattr(work, "func", None).__name__ == "_run_piece"

        def replay() -> None:
            self.n_replayed += 1
            self.n_replayed_of_pieces += is_piece
            work()

        return replay


def replays(capture: Rerun, n_pieces: int) -> int:
    """Return the number of steps: whole graphs, and piecewise ones divided by their pieces."""
    whole = capture.n_replayed - capture.n_replayed_of_pieces
    return whole + capture.n_replayed_of_pieces // n_pieces


_OPTIONS = {"max_batch_size": 11, "drafts": "off"}


@contextmanager
def engine_with(
    capture: Callable[[Callable[[], None]], Callable[[], None]],
    model: PreTrainedModel,
    **changes: object,
) -> Iterator[Engine]:
    """``changes`` are fields of the config. Each row of a decode step is a request."""
    mode = StepMode(capture=capture)
    with running_engine(model, mode=mode, **{**_OPTIONS, **changes}) as engine:
        yield engine
