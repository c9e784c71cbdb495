"""Which clusters `loraplex cluster up` serves on this machine: $LORAPLEX_HOME/clusters/PID.json.

A cluster is also announced as a server: commands that want one, as `loraplex adapters`, find it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraplex_server.listening import reachable_url
from loraplex_server.model.pull import DEFAULT_BASE
from loraplex_server.running_servers import announced

if TYPE_CHECKING:
    from .config import ClusterConfig

__all__ = ["RunningCluster", "announced_cluster", "running_clusters"]

_log = logging.getLogger(__name__)


class RunningCluster(NamedTuple):
    pid: int  # of `loraplex cluster up`
    address: str  # of Ray
    token: str | None  # the file of Ray's token
    url: str  # without /v1
    name: str  # of Ray's application
    drain_timeout_s: float  # that running requests have when it goes down

    @property
    def lives(self) -> bool:
        """A process that has ended, and that its parent has not asked for, does not."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return fields[0] != "Z"


@contextlib.contextmanager
def announced_cluster(
    home: Path, config: ClusterConfig, address: str, token: Path | None
) -> Iterator[str]:
    """The cluster can be found inside the block, at the URL that is given.

    A home that cannot be written is logged: nobody ends what serves for that.
    """
    http, store = config.server.http, config.server.store.root
    assert store is not None  # ``ClusterConfig`` has one always
    url = reachable_url(http.host, http.port)
    file = home / "clusters" / f"{os.getpid()}.json"
    shown_token = None if token is None else str(token)
    told = {
        "address": address,
        "token": shown_token,
        "url": url,
        "name": config.name,
        "drain_timeout_s": http.drain_timeout_s,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told), encoding="utf-8")
    except OSError as error:
        _log.warning("`loraplex cluster down` and `status` do not find this cluster: %s", error)
    try:
        with announced(home, url, config.server.model or DEFAULT_BASE, store):
            yield url
    finally:
        with contextlib.suppress(OSError):  # readers leave out one whose process has ended
            file.unlink(missing_ok=True)


def running_clusters(home: Path) -> list[RunningCluster]:
    """Those whose process lives, the last started last. Files of others are removed."""
    found = []
    files = sorted((home / "clusters").glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files:
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            one = RunningCluster(int(file.stem), **told)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if one.lives:
            found.append(one)
        else:
            file.unlink(missing_ok=True)
    return found
