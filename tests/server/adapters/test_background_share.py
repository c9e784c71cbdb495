"""Work in the background takes its share of the time beside requests, and all of it alone."""

import math
import threading

import pytest

from loraplex_server.adapters.learning import background_share
from loraplex_server.adapters.learning.background_share import BackgroundShare


class Day(threading.Event):
    """A clock that only work and waiting move on; it is told to stop at ``stops_at``."""

    def __init__(self, stops_at: float = math.inf) -> None:
        super().__init__()
        self.now, self.stops_at = 0.0, stops_at
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if self.now < self.stops_at:
            self.waits.append(timeout)
            self.now += timeout
        return self.now >= self.stops_at


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    day = Day()
    monkeypatch.setattr(background_share, "time", day)
    return day


def worked(share: BackgroundShare, day: Day, pieces: int) -> None:
    share.start(day)
    for _ in range(pieces):
        day.now += 0.004
        share.rest()


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_beside_requests_it_takes_its_share(day: Day, share: float) -> None:
    worked(BackgroundShare(share, lambda: True), day, 100)
    assert day.now == pytest.approx(0.4 / share)


def test_alone_it_takes_all_of_it(day: Day) -> None:
    worked(BackgroundShare(0.1, lambda: False), day, 100)
    assert not day.waits


def test_a_rest_ends_when_the_last_request_does(day: Day) -> None:
    worked(BackgroundShare(0.001, lambda: day.now < 0.3), day, 10)
    assert day.now < 0.3 + 0.05 + 10 * 0.004


def test_short_pieces_are_saved_up(day: Day) -> None:
    share = BackgroundShare(0.5, lambda: True)
    share.start(day)
    for _ in range(100):
        day.now += 0.0001
        share.rest()
    assert len(day.waits) <= 5
    assert day.now == pytest.approx(0.02, rel=0.2)


def test_what_is_to_stop_rests_no_more(day: Day) -> None:
    day.stops_at = 1.0
    worked(BackgroundShare(0.01, lambda: True), day, 100)
    assert day.now < 1.0 + 0.05 + 100 * 0.004


def test_what_one_job_owes_the_next_does_not_pay(day: Day) -> None:
    share = BackgroundShare(0.5, lambda: True)
    share.start(day)
    day.now += 0.0015
    share.rest()
    share.start(day)
    day.now += 0.0015
    share.rest()
    assert not day.waits
