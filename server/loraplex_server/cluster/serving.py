"""What `loraplex cluster up` does from the start of a cluster to its end.

signals ────────────────────┐
a start or upgrade is done ─┼──▶ one queue ──▶ this thread: upgrade, say it, or end
the cluster is lost ────────┘
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import NamedTuple

from loraplex_server.settings import ConfigError

from .config import ClusterConfig
from .errors import ClusterLost
from .running import connect, deploy, remove, running_ray, start
from .watching import watched_application, watched_ray

__all__ = ["refused_change", "serve_until_told"]

_END = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class _Done:
    """What ran beside has ended."""

    error: Exception | None = None
    address: str = ""  # of Ray, after the start


@dataclass(frozen=True, slots=True)
class _Lost:
    why: str


class _Connected(NamedTuple):
    """To Ray."""


_Told = signal.Signals | _Connected | _Done | _Lost


def serve_until_told(
    config: ClusterConfig,
    folder: Path | None,
    *,
    read: Callable[[], ClusterConfig],
    serving: Callable[[ClusterConfig, str], AbstractContextManager[None]],
    say: Callable[[str], None],
) -> None:
    """Returns after SIGTERM or SIGINT, when nothing of the cluster runs any more.

    ``folder``: see ``running_ray``. ``read`` reads the config again on SIGHUP: a rolling upgrade,
    and if it fails the old version serves on. ``serving`` is entered with what is served and Ray's
    address while the application serves, anew after each upgrade; ``say`` may be called from any
    thread. Raises ClusterLost if Ray or the application goes away, OSError or RuntimeError if it
    does not start.
    """
    told: SimpleQueue[_Told] = SimpleQueue()

    def on_loss(why: str) -> None:
        told.put(_Lost(why))

    with running_ray(config, folder, on_loss) as address, contextlib.ExitStack() as closing:
        _take_signals(told)
        deployed = _Deployed(config)
        closing.push(_unless_lost(deployed))
        _beside(told, partial(_started, config, address, told))
        while not isinstance(started := _next(told), _Done) and started not in _END:
            if started == signal.SIGHUP:
                say("not upgraded: the cluster is still starting")
            else:
                _take_signals(told)  # Ray has taken them: 3 s after a SIGTERM it would abort
        if not isinstance(started, _Done):
            return
        if started.error is not None:
            raise started.error
        if folder is None:
            closing.enter_context(watched_ray(started.address, on_loss))
        closing.enter_context(watched_application(config.name, say, on_loss))
        while True:
            with serving(deployed.config, started.address):
                if not _upgraded(deployed, told, read, say):
                    return


def refused_change(old: ClusterConfig, new: ClusterConfig) -> str | None:
    """Why an upgrade cannot bring ``old`` to ``new``; None if it can."""
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
    config: ClusterConfig  # what serves, or will when an upgrade is done


def _upgraded(
    deployed: _Deployed,
    told: SimpleQueue[_Told],
    read: Callable[[], ClusterConfig],
    say: Callable[[str], None],
) -> bool:
    """Returns after an upgrade, or False when told to end. One at a time. Raises ClusterLost."""
    before, runs, is_wanted = deployed.config, False, False
    while True:
        match _next(told):
            case signal.SIGHUP:
                is_wanted = True
            case _Done(error=None):
                say("upgraded")
                if is_wanted:
                    told.put(signal.SIGHUP)
                return True
            case _Done(error=error):
                deployed.config, runs = before, False
                say(f"not upgraded: {error}")
            case _:
                return False
        if is_wanted and not runs:
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
            _beside(told, partial(_deploy, config))
            runs = True


def _started(config: ClusterConfig, address: str, told: SimpleQueue[_Told]) -> _Done:
    full_address = connect(address)
    told.put(_Connected())
    start(config)
    return _Done(address=full_address)


def _deploy(config: ClusterConfig) -> _Done:
    deploy(config)
    return _Done()


def _unless_lost(deployed: _Deployed) -> Callable[[object, object, object], None]:
    """A Ray that is lost is left alone: what asks it waits, and in the end Ray ends our process."""

    def leave(kind: object, error: object, trace: object) -> None:
        if not isinstance(error, ClusterLost):
            remove(deployed.config)

    return leave


def _next(told: SimpleQueue[_Told]) -> signal.Signals | _Connected | _Done:
    """Raises ClusterLost."""
    found = told.get()
    if isinstance(found, _Lost):
        raise ClusterLost(f"{found.why}; what was started here has been stopped")
    return found


def _beside(told: SimpleQueue[_Told], work: Callable[[], _Done]) -> None:
    """In a thread, so that a cluster that does not get ready can be ended."""

    def run() -> None:
        try:
            told.put(work())
        except Exception as error:
            told.put(_Done(error))

    threading.Thread(target=run, daemon=True).start()


def _take_signals(told: SimpleQueue[_Told]) -> None:
    """They are told from now on. Main thread only."""

    def tell(number: int, frame: FrameType | None) -> None:
        told.put(signal.Signals(number))

    for number in (*_END, signal.SIGHUP):
        signal.signal(number, tell)
