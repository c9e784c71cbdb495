"""Locust's users: each streams chat completions and reports TTFT, TPOT and E2E of every request.

Importing locust patches the standard library (gevent), so this module is imported first, and only
in the process that makes the load.
"""

import random
import time
from collections.abc import Callable
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import LoadTestShape, User, constant, task
from locust.env import Environment

from .client import Outcome, StreamingClient
from .scenario import Phase, Scenario
from .traffic import LoadRequest, Traffic

_MAX_OUTSTANDING = 4000  # of an open loop
_MAX_RETRY_WAIT_S = 5.0
_STOP_TIMEOUT_S = 120.0  # for the answers that are still out when a phase ends


class RefusedError(Exception):
    """A request refused by 429 or 503 with Retry-After: neither served nor lost."""


class PhaseLoad:
    """The shared state of a phase's users: traffic, client and clock."""

    def __init__(self, phase: Phase, traffic: Traffic, client: StreamingClient) -> None:
        self.phase = phase
        self._traffic = traffic
        self._client = client
        self.started = time.perf_counter()
        self.n_unsent = 0  # arrivals that found too many others outstanding

    @property
    def now(self) -> float:
        """Return seconds since the counted part began; negative while warming up."""
        return time.perf_counter() - self.started - self.phase.warmup_s

    @property
    def over(self) -> bool:
        return self.now >= self.phase.seconds

    def level(self) -> float:
        """Return the current users, or arrivals per second."""
        shape = self.phase.users or self.phase.rate
        assert shape is not None
        return shape.level(max(self.now, 0.0), self.phase.seconds)

    def draw(self) -> LoadRequest:
        return self._traffic.next(self.now / self.phase.seconds)

    def send(self, environment: Environment, request: LoadRequest) -> Outcome:
        """Send a request, wait for the complete answer and report it to locust."""
        sent_at = self.now
        outcome = self._client.stream(request.body)
        _report(environment, request, outcome, sent_at)
        return outcome


class ChatUser(User):
    """A closed-loop user: sends when the last answer is complete."""

    abstract = True
    wait_time = constant(0)
    load: ClassVar[PhaseLoad]

    @task
    def chat(self) -> None:
        if self.load.over:
            gevent.sleep(0.2)  # until locust stops this user
            return
        outcome = self.load.send(self.environment, self.load.draw())
        if outcome.refused:
            gevent.sleep(min(float(outcome.retry_after or 1), _MAX_RETRY_WAIT_S))
        elif outcome.error:
            gevent.sleep(0.5)


class ArrivalUser(User):
    """An open-loop user: one dispatcher whose requests do not wait for each other."""

    abstract = True
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
        # Drawn here, not in the greenlet: so the seed alone decides the order of requests.
        self._outstanding.spawn(self.load.send, self.environment, self.load.draw())

    def on_stop(self) -> None:
        self._outstanding.join(timeout=self.environment.stop_timeout)


class PhaseShape(LoadTestShape):
    """A load shape that tells locust the users of a phase and its end."""

    abstract = True  # built by hand for each phase, not found on import

    def __init__(self, load: PhaseLoad) -> None:
        super().__init__()
        self._load = load

    def tick(self) -> tuple[int, float] | None:
        if self._load.over:
            return None
        users = 1 if self._load.phase.users is None else round(self._load.level())
        return users, 100.0


def run_phase(
    scenario: Scenario,
    load: PhaseLoad,
    on_request: Callable[..., None],
    on_tick: Callable[[float], None],
) -> None:
    """Run one phase and wait for all its answers. Blocks.

    ``on_tick`` is called four times a second with ``load.now``.
    """
    base = ArrivalUser if load.phase.users is None else ChatUser
    user = type("PhaseUser", (base,), {"load": load, "seed": scenario.seed})
    environment = Environment(
        user_classes=[user], shape_class=PhaseShape(load), stop_timeout=_STOP_TIMEOUT_S
    )
    environment.events.request.add_listener(on_request)
    runner = environment.create_local_runner()
    load.started = time.perf_counter()
    runner.start_shape()
    while not load.over:
        on_tick(load.now)
        gevent.sleep(0.25)
    runner.quit()


def _report(
    environment: Environment, request: LoadRequest, outcome: Outcome, sent_at: float
) -> None:
    """Report TTFT, TPOT and E2E by family; E2E carries the whole outcome."""
    problem: Exception | None = None
    if outcome.refused:
        problem = RefusedError(f"{outcome.status}, Retry-After {outcome.retry_after}")
    elif outcome.error:
        problem = RuntimeError(outcome.error)

    def fire(kind: str, seconds: float, n_tokens: int = 0, **extra: Any) -> None:
        environment.events.request.fire(
            request_type=kind,
            name=request.family,
            response_time=1000 * seconds,
            response_length=n_tokens,
            **{"exception": None, "context": {}, **extra},
        )

    if outcome.ttft_s is not None:
        fire("TTFT", outcome.ttft_s)
    if outcome.gaps_s:
        fire("TPOT", outcome.tpot_s)
    context = {"request": request, "outcome": outcome, "sent_at": sent_at}
    fire("E2E", outcome.e2e_s, outcome.n_tokens, exception=problem, context=context)
