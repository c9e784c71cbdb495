"""Log records that name a part are failures of it, for /health and /metrics."""

import logging
import sqlite3
from collections.abc import Iterator

import pytest

from loraplex_adapter_store.part_log import worked
from loraplex_server.health_tracker import HealthTracker, log_extra

LOG = logging.getLogger("loraplex.some.part")


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def tracker(clock: _Clock) -> Iterator[HealthTracker]:
    tracker = HealthTracker(clock)
    with tracker.listening():
        yield tracker


def test_a_part_is_degraded_until_it_works_or_a_minute_after_its_last_failure(
    tracker: HealthTracker, clock: _Clock
) -> None:
    LOG.error("cannot write: %s", OSError(28, "/secret"), extra={"part": "storage"})
    (part,) = tracker.degraded
    assert (part.part, part.problem, part.n_failures) == ("storage", "No space left on device", 1)
    clock.now += 61
    assert tracker.degraded == ()
    LOG.error("cannot write", extra={"part": "storage"})
    worked("catalogue")
    assert tracker.degraded != ()
    worked("storage")
    assert tracker.degraded == ()
    assert tracker.counts["storage"] == 2


def test_a_model_that_fails_three_times_in_a_row_is_degraded(
    tracker: HealthTracker, clock: _Clock
) -> None:
    LOG.error("a step failed", extra={"part": "model"})
    worked("model")
    for _ in range(3):
        assert tracker.degraded == ()
        clock.now += 50
        try:
            raise MemoryError
        except MemoryError:
            LOG.exception("a step failed", extra={"part": "model"})
    (part,) = tracker.degraded
    assert (part.part, part.problem, part.n_failures) == ("model", "out of memory", 3)


def test_other_records_count_for_nothing(tracker: HealthTracker) -> None:
    LOG.error("no part")
    LOG.error("unknown part", extra={"part": "kitchen"})
    LOG.warning("no failure", extra={"part": "storage"})
    LOG.error("counted where it happened", extra=log_extra(sqlite3.OperationalError()))
    assert not any(tracker.counts.values())
