"""Which servers run on this machine, so that the command line finds them without --url.

A server or cluster that is ready writes ``$LORAPLEX_HOME/servers/PID.json`` and removes it when it
goes down.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["RunningServer", "announced", "running_servers"]


class RunningServer(NamedTuple):
    pid: int
    url: str  # without /v1
    model: str  # as the operator named it
    store: str  # the folder of its adapters


@contextlib.contextmanager
def announced(home: Path, url: str, model: str, store: Path) -> Iterator[None]:
    """The server can be found inside the block. A home that cannot be written is no error."""
    file = home / "servers" / f"{os.getpid()}.json"
    text = json.dumps({"url": url, "model": model, "store": str(store)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # readers leave out one whose process has ended
            file.unlink(missing_ok=True)


def running_servers(home: Path) -> list[RunningServer]:
    """Those whose process lives. Files of processes that were killed are removed."""
    found = []
    for file in sorted((home / "servers").glob("*.json")):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            server = RunningServer(int(file.stem), told["url"], told["model"], told["store"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if _lives(server.pid):
            found.append(server)
        else:
            file.unlink(missing_ok=True)
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
