"""The locust side: users that stream and report TTFT, ITL and E2E as entries of their own.

Importing this module patches the standard library (gevent): only the load process does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import LoadTestShape, User, constant, task

from .scenario import Phase, Scenario
from .streaming import Connections, Outcome
from .traffic import Ask, Traffic

__all__ = ["ArrivalUser", "ChatUser", "PhaseLoad", "PhaseShape", "RefusedError"]

_MAX_OUTSTANDING = 4000  # of an open loop
_MAX_RETRY_WAIT_S = 5.0


class RefusedError(Exception):
    """429 or 503 with Retry-After: not lost, but not served either."""


class PhaseLoad:
    """What the users of one phase share: the traffic, the connections, the clock."""

    def __init__(self, phase: Phase, traffic: Traffic, connections: Connections) -> None:
        self.phase = phase
        self._traffic = traffic
        self._connections = connections
        self.started = time.perf_counter()
        self.n_unsent = 0  # arrivals that found too many others outstanding

    @property
    def now(self) -> float:
        """Seconds since the counted part began; negative while warming up."""
        return time.perf_counter() - self.started - self.phase.warmup_s

    @property
    def over(self) -> bool:
        return self.now >= self.phase.seconds

    def level(self) -> float:
        shape = self.phase.users or self.phase.rate
        assert shape is not None
        return shape.level(max(self.now, 0.0), self.phase.seconds)

    def draw(self) -> Ask:
        return self._traffic.next(self.now / self.phase.seconds)

    def send(self, environment: Any, ask: Ask) -> Outcome:
        sent_at = self.now
        outcome = self._connections.stream(ask.body)
        _report(environment, self.phase.label, ask, outcome, sent_at)
        return outcome


class ChatUser(User):
    """Closed loop: sends when its last answer is complete; waits when it is told to."""

    wait_time = constant(0)
    load: ClassVar[PhaseLoad]

    @task
    def chat(self) -> None:
        if self.load.over:
            gevent.sleep(0.2)  # until locust stops us
            return
        outcome = self.load.send(self.environment, self.load.draw())
        if outcome.refused:
            gevent.sleep(min(float(outcome.retry_after or 1), _MAX_RETRY_WAIT_S))
        elif outcome.error:
            gevent.sleep(0.5)


class ArrivalUser(User):
    """Open loop: one dispatcher, whose arrivals do not wait for each other."""

    wait_time = constant(0)
    load: ClassVar[PhaseLoad]
    seed: ClassVar[int] = 0

    def on_start(self) -> None:
        self._arrivals = random.Random(f"{self.seed}/arrivals")  # the same in each phase
        self._due = time.perf_counter()
        self._outstanding = Group()

    @task
    def arrive(self) -> None:
        rate = self.load.level()
        if self.load.over or rate <= 0:
            gevent.sleep(0.1)
            self._due = time.perf_counter()
            return
        self._due += self._arrivals.expovariate(rate)
        gevent.sleep(max(0.0, self._due - time.perf_counter()))
        if len(self._outstanding) >= _MAX_OUTSTANDING:
            self.load.n_unsent += 1
            return
        # Drawn here, not in the greenlet: the order of requests is the seed's.
        self._outstanding.spawn(self.load.send, self.environment, self.load.draw())

    def on_stop(self) -> None:
        self._outstanding.join(timeout=self.environment.stop_timeout)


class PhaseShape(LoadTestShape):
    """Locust's view of a phase: how many users, of which class, until when."""

    abstract = True  # built by hand for each phase, not found on import

    def __init__(self, load: PhaseLoad, user: type[User]) -> None:
        super().__init__()
        self._load = load
        self._user = user

    def tick(self) -> tuple[int, float] | None:
        if self._load.over:
            return None
        users = 1 if self._user is ArrivalUser else round(self._load.level())
        return users, 100.0


def run_phase(
    scenario: Scenario,
    load: PhaseLoad,
    on_request: Callable[..., None],
    on_tick: Callable[[float], None],
    *,
    stop_timeout_s: float,
) -> None:
    """Runs one phase and waits for the answers that are still out. Blocks."""
    from locust.env import Environment

    user: type[User] = ChatUser if load.phase.users is not None else ArrivalUser
    user.load = load
    if user is ArrivalUser:
        ArrivalUser.seed = scenario.seed
    environment = Environment(
        user_classes=[user],
        shape_class=PhaseShape(load, user),
        stop_timeout=stop_timeout_s,
        reset_stats=False,
    )
    environment.events.request.add_listener(on_request)
    runner = environment.create_local_runner()
    load.started = time.perf_counter()
    runner.start_shape()
    while not load.over:
        on_tick(load.now)
        gevent.sleep(0.25)
    runner.quit()


def _report(environment: Any, label: str, ask: Ask, outcome: Outcome, sent_at: float) -> None:
    """TTFT, every gap and E2E as entries of locust's statistics; E2E carries the whole outcome."""
    fire = environment.events.request.fire
    if outcome.ttft_s is not None:
        fire(
            request_type="TTFT",
            name=ask.family,
            response_time=1000 * outcome.ttft_s,
            response_length=0,
            exception=None,
            context={},
        )
    for gap in outcome.gaps_s:
        fire(
            request_type="ITL",
            name=ask.family,
            response_time=1000 * gap,
            response_length=0,
            exception=None,
            context={},
        )
    problem: Exception | None = None
    if outcome.refused:
        problem = RefusedError(f"{outcome.status}, Retry-After {outcome.retry_after}")
    elif outcome.error:
        problem = RuntimeError(outcome.error)
    fire(
        request_type="E2E",
        name=ask.family,
        response_time=1000 * outcome.e2e_s,
        response_length=outcome.n_tokens,
        exception=problem,
        context={"ask": ask, "outcome": outcome, "sent_at": sent_at, "phase": label},
    )
