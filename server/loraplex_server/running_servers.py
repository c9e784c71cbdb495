"""The running servers and clusters of this machine, as files $LORAPLEX_HOME/servers/PID.json.

Commands such as `loraplex adapters` read the files to find a server without --url.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)


class RunningServer(NamedTuple):
    pid: int  # of `loraplex serve` or `loraplex cluster up`
    url: str  # without /v1
    cluster: Mapping[str, Any] | None  # of a cluster: see ``RunningCluster``

    @property
    def lives(self) -> bool:
        """Return True if the process runs. Zombie processes do not count."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        with contextlib.suppress(OSError):  # Linux only
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] != "Z"
        return True


@contextlib.contextmanager
def announced(home: Path, url: str, cluster: Mapping[str, object] | None = None) -> Iterator[None]:
    """Announce the server inside the block. ``url`` has no /v1.

    A home that cannot be written is only logged.
    """
    file = home / "servers" / f"{os.getpid()}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"url": url, "cluster": cluster}), encoding="utf-8")
    except OSError as error:
        level = logging.DEBUG if cluster is None else logging.WARNING
        _log.log(level, "commands do not find %s, as `loraplex cluster down`: %s", url, error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # readers skip files of ended processes
            file.unlink(missing_ok=True)


def running_servers(home: Path) -> list[RunningServer]:
    """Return the running servers, oldest first, and delete the files of ended processes."""
    servers = []
    for file in (home / "servers").glob("*.json"):
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            server = RunningServer(int(file.stem), str(fields["url"]), fields.get("cluster"))
            started = file.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if server.lives:
            servers.append((started, server))
        else:
            file.unlink(missing_ok=True)
    return [server for _, server in sorted(servers, key=lambda pair: pair[0])]
