"""What a Ray of our own has on disk, and who may talk to it. Imported before Ray is.

Ray reads its mode of authentication and its time limits once, when it is imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["RAY_SETTINGS", "own_ray_folder", "use_token"]

# On one machine a process that says nothing has rarely died: other work holds the processors.
RAY_SETTINGS = {
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    # By default its processes have priority 15, and what learns beside an engine has 10.
    "RAY_worker_niceness": "0",
}


@contextlib.contextmanager
def own_ray_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs, gone afterwards, with ``token``: what Ray asks for.

    Whoever can talk to Ray runs code here: only who can read that file may.
    """
    folder = Path(tempfile.mkdtemp(prefix="lx"))  # short: sockets below it have long names
    try:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        use_token(token)
        for name, value in RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def use_token(file: Path) -> None:
    """For this process and those that it starts."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
