"""Looks whether a cluster that should serve still does.

Ray's address ── a connection ──▶ none for a while: lost    (only of a Ray that was joined)
Ray Serve ───── its status ─────▶ no such application: lost;  unhealthy: said, Ray goes on trying
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

__all__ = ["watched_application", "watched_ray"]

_LOOK_S = 2.0
_CONNECT_S = 5.0
# Ray ends every process of its own, ours too and without a word, after 60 s without its head.
_PATIENCE_S = 30.0
_BAD = {ApplicationStatus.UNHEALTHY, ApplicationStatus.DEPLOY_FAILED}


@contextlib.contextmanager
def watched_ray(
    address: str, on_loss: Callable[[str], None], *, patience_s: float = _PATIENCE_S
) -> Iterator[None]:
    """``on_loss`` is told, in another thread, when nobody listens at ``address`` for so long."""
    host, _, port = address.rpartition(":")
    last = time.monotonic()

    def look() -> bool:
        nonlocal last
        try:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
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
    """``say`` is told, in another thread, when the application gets unhealthy or well again.

    ``on_loss`` is told when it has gone: somebody has removed it, or has shut Ray Serve down.
    """
    last = time.monotonic()
    told: ApplicationStatus | None = None

    def look() -> bool:
        nonlocal last, told
        try:
            found = serve.status().applications.get(name)
        except (RayError, RayServeException) as error:  # its controller starts again, or is gone
            if time.monotonic() - last < _PATIENCE_S:
                return True
            on_loss(f"Ray Serve does not answer: {error}")
            return False
        if found is None:
            on_loss(f"the application {name!r} was removed from Ray Serve")
            return False
        last = time.monotonic()
        if found.status in _BAD and found.status != told:
            say(f"{name} is {found.status.value}: {found.message.strip() or 'no reason given'}")
        elif found.status is ApplicationStatus.RUNNING and told in _BAD:
            say(f"{name} is {found.status.value} again")
        told = found.status
        return True

    with _repeated(look):
        yield


@contextlib.contextmanager
def _repeated(look: Callable[[], bool]) -> Iterator[None]:
    """``look`` runs in a thread, again and again, until it is false or the block is left."""
    is_left = threading.Event()

    def run() -> None:
        while not is_left.wait(_LOOK_S) and look():
            pass

    threading.Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        is_left.set()
