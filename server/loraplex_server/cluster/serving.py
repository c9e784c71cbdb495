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

__all__ = ["serve_until_told"]

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
    serving: Callable[[str], AbstractContextManager[None]],
    say: Callable[[str], None],
) -> None:
    """Returns after SIGTERM or SIGINT, when nothing of the cluster runs any more.

    ``folder``: see ``running_ray``. ``read`` reads the config again on SIGHUP: a rolling upgrade,
    and if it fails the old version serves on. ``serving`` is entered with Ray's address while the
    application serves; ``say`` may be called from any thread. Raises ClusterLost if Ray or the
    application goes away, OSError or RuntimeError if it does not start.
    """
    told: SimpleQueue[_Told] = SimpleQueue()

    def on_loss(why: str) -> None:
        told.put(_Lost(why))

    with running_ray(config, folder, on_loss) as address, contextlib.ExitStack() as closing:
        _take_signals(told)
        closing.push(_unless_lost(config))
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
        closing.enter_context(serving(started.address))
        _upgrade_until_told(told, read, say)


def _upgrade_until_told(
    told: SimpleQueue[_Told], read: Callable[[], ClusterConfig], say: Callable[[str], None]
) -> None:
    """One upgrade at a time. Raises ClusterLost."""
    runs = is_wanted = False
    while True:
        match _next(told):
            case signal.SIGHUP:
                is_wanted = True
            case _Done(error=error):
                runs = False
                say("upgraded" if error is None else f"not upgraded: {error}")
            case _:
                return
        if is_wanted and not runs:
            is_wanted = False
            try:
                config = read()
            except ConfigError as error:
                say(f"not upgraded: {error}")
                continue
            _beside(told, partial(_deployed, config))
            runs = True


def _started(config: ClusterConfig, address: str, told: SimpleQueue[_Told]) -> _Done:
    full_address = connect(address)
    told.put(_Connected())
    start(config)
    return _Done(address=full_address)


def _deployed(config: ClusterConfig) -> _Done:
    deploy(config)
    return _Done()


def _unless_lost(config: ClusterConfig) -> Callable[[object, object, object], None]:
    """A Ray that is lost is left alone: what asks it waits, and in the end Ray ends our process."""

    def leave(kind: object, error: object, trace: object) -> None:
        if not isinstance(error, ClusterLost):
            remove(config)

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
