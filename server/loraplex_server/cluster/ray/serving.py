"""`loraplex cluster up`: starts a cluster, upgrades it on SIGHUP, and ends it.

signals ─────────────────────────┐
end of a start or an upgrade ────┼──▶ one queue ──▶ main thread: upgrade, report, or end
loss of Ray or the application ──┘

Ray's address ── connection ──▶ none for 30 s: lost          (only of a Ray that was joined)
Ray Serve ────── status ──────▶ no such application: lost;  unhealthy: reported, Ray keeps trying
"""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import NamedTuple

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from loraplex_server.cluster.config import ClusterConfig
from loraplex_server.settings.config import ConfigError

from .running import connect, deploy, remove, running_ray, start
from .running_clusters import ClusterLost

_PERIOD_S = 2.0
_CONNECT_TIMEOUT_S = 5.0
# Ray ends all its processes, this one too, without a message after 60 s without its head.
_PATIENCE_S = 30.0
_BAD = {ApplicationStatus.UNHEALTHY, ApplicationStatus.DEPLOY_FAILED}
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def watched_ray(
    address: str, on_loss: Callable[[str], None], *, patience_s: float = _PATIENCE_S
) -> Iterator[None]:
    """Call ``on_loss``, in another thread, if nothing listens at ``address`` for ``patience_s``."""
    host, _, port = address.rpartition(":")
    last = time.monotonic()

    def look() -> bool:
        nonlocal last
        try:
            socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
            last = time.monotonic()
        except OSError as error:
            if time.monotonic() - last >= patience_s:
                on_loss(f"Ray at {address} cannot be reached: {error}")
                return False
        return True

    with _repeated(look):
        yield


@contextlib.contextmanager
def watched_application(
    name: str, say: Callable[[str], None], on_loss: Callable[[str], None]
) -> Iterator[None]:
    """Call ``say``, in another thread, when the application's health changes.

    ``on_loss`` is called when the application or Ray Serve was removed.
    """
    last = time.monotonic()
    reported: ApplicationStatus | None = None

    def look() -> bool:
        nonlocal last, reported
        try:
            status = serve.status().applications.get(name)
        except (RayError, RayServeException) as error:  # the controller restarts, or is gone
            if time.monotonic() - last < _PATIENCE_S:
                return True
            on_loss(f"Ray Serve does not answer: {error}")
            return False
        if status is None:
            on_loss(f"the application {name!r} was removed from Ray Serve")
            return False
        last = time.monotonic()
        if status.status in _BAD and status.status != reported:
            say(f"{name} is {status.status.value}: {status.message.strip() or 'no reason given'}")
        elif status.status is ApplicationStatus.RUNNING and reported in _BAD:
            say(f"{name} is {status.status.value} again")
        reported = status.status
        return True

    with _repeated(look):
        yield


@contextlib.contextmanager
def _repeated(look: Callable[[], bool]) -> Iterator[None]:
    """Repeat ``look`` in a thread until it returns False or the block ends."""
    is_left = threading.Event()

    def run() -> None:
        while not is_left.wait(_PERIOD_S) and look():
            pass

    threading.Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        is_left.set()


@dataclass(frozen=True, slots=True)
class _Done:
    """Message: a start or an upgrade has ended."""

    error: Exception | None = None
    address: str = ""  # Ray's, after a start


@dataclass(frozen=True, slots=True)
class _Lost:
    why: str


class _Connected(NamedTuple):
    """The connection to Ray is open, and Ray has replaced the signal handlers."""


_Event = signal.Signals | _Connected | _Done | _Lost


def serve_until_stopped(
    config: ClusterConfig,
    folder: Path | None,
    *,
    read: Callable[[], ClusterConfig],
    serving: Callable[[ClusterConfig, str], AbstractContextManager[None]],
    say: Callable[[str], None],
) -> None:
    """Run a cluster until SIGTERM or SIGINT. Returns when all its processes have ended.

    ``folder``: see ``running_ray``. ``read`` reads the config again on SIGHUP for a rolling
    upgrade; if the upgrade fails, the old version continues. ``serving`` is entered with the config
    and Ray's address while the application serves, anew after each upgrade. ``say`` may be called
    from any thread. Raises ClusterLost if Ray or the application disappears, OSError or
    RuntimeError if the cluster does not start.
    """
    events: SimpleQueue[_Event] = SimpleQueue()

    def on_loss(why: str) -> None:
        events.put(_Lost(why))

    with running_ray(config, folder, on_loss) as address, contextlib.ExitStack() as closing:
        _take_signals(events)
        deployed = _Deployed(config)
        closing.push(_unless_lost(deployed))
        _in_thread(events, partial(_start, config, address, events))
        while not isinstance(started := _next(events), _Done) and started not in _STOP_SIGNALS:
            if started == signal.SIGHUP:
                say("not upgraded: the cluster is still starting")
            else:
                _take_signals(events)  # with Ray's handlers, SIGTERM would abort after 3 s
        if not isinstance(started, _Done):
            return
        if started.error is not None:
            raise started.error
        if folder is None:
            closing.enter_context(watched_ray(started.address, on_loss))
        closing.enter_context(watched_application(config.name, say, on_loss))
        while True:
            with serving(deployed.config, started.address):
                if not _upgraded(deployed, events, read, say):
                    return


def refused_change(old: ClusterConfig, new: ClusterConfig) -> str | None:
    """Return why an upgrade from ``old`` to ``new`` is impossible, or None."""
    remedy = "run `loraplex cluster down` and `up` instead"
    if new.server.model != old.server.model:
        return (
            f"server.model was {old.server.model or 'the default base'} and is "
            f"{new.server.model or 'the default base'}: gateways of one base would meet engines of "
            f"the other; {remedy}"
        )
    for name, before, now in (
        ("name", old.name, new.name),
        ("server.host", old.server.http.host, new.server.http.host),
        ("server.port", old.server.http.port, new.server.http.port),
        ("ray", old.ray, new.ray),
    ):
        if now != before:
            return f"{name} has changed, which is set when a cluster starts; {remedy}"
    return None


@dataclass(slots=True)
class _Deployed:
    config: ClusterConfig  # that serves, or will after the running upgrade


def _upgraded(
    deployed: _Deployed,
    events: SimpleQueue[_Event],
    read: Callable[[], ClusterConfig],
    say: Callable[[str], None],
) -> bool:
    """Return True after an upgrade, False after a stop signal. Raises ClusterLost."""
    previous, is_running, is_wanted = deployed.config, False, False
    while True:
        match _next(events):
            case signal.SIGHUP:
                is_wanted = True
            case _Done(error=None):
                say("upgraded")
                if is_wanted:
                    events.put(signal.SIGHUP)
                return True
            case _Done(error=error):
                deployed.config, is_running = previous, False
                say(f"not upgraded: {error}")
            case _:
                return False
        if is_wanted and not is_running:
            is_wanted = False
            try:
                config = read()
            except ConfigError as error:
                say(f"not upgraded: {error}")
                continue
            if (why := refused_change(deployed.config, config)) is not None:
                say(f"not upgraded: {why}")
                continue
            deployed.config = config
            _in_thread(events, partial(_deploy, config))
            is_running = True


def _start(config: ClusterConfig, address: str, events: SimpleQueue[_Event]) -> _Done:
    full_address = connect(address)
    events.put(_Connected())
    start(config)
    return _Done(address=full_address)


def _deploy(config: ClusterConfig) -> _Done:
    deploy(config)
    return _Done()


def _unless_lost(deployed: _Deployed) -> Callable[[object, object, object], None]:
    """Remove the application, unless Ray is lost: then a call would hang and end this process."""

    def leave(kind: object, error: object, trace: object) -> None:
        if not isinstance(error, ClusterLost):
            remove(deployed.config)

    return leave


def _next(events: SimpleQueue[_Event]) -> signal.Signals | _Connected | _Done:
    """Wait for the next event. Raises ClusterLost."""
    event = events.get()
    if isinstance(event, _Lost):
        raise ClusterLost(f"{event.why}; what was started here has been stopped")
    return event


def _in_thread(events: SimpleQueue[_Event], work: Callable[[], _Done]) -> None:
    """Run ``work`` in a thread, so that a cluster that never gets ready can be ended."""

    def run() -> None:
        try:
            events.put(work())
        except Exception as error:
            events.put(_Done(error))

    threading.Thread(target=run, daemon=True).start()


def _take_signals(events: SimpleQueue[_Event]) -> None:
    """Put signals into the queue from now on. Main thread only."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        events.put(signal.Signals(number))

    for number in (*_STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, on_signal)
