"""A Ray of one node, for machines that other work holds: `python -m tests.support.ray_head FOLDER`.

Ray gives the two agents of a node 15 s to say where they listen, and ends if they do not. Here that
is written down before they start. Says its address; ends when its input does.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)

__all__: list[str] = []

_NODE_ID = os.urandom(28).hex()
_OBJECT_STORE_BYTES = 100 << 20
_CPUS = 8  # by Ray's count: it says how many processes fit, in an upgrade twice as many


def main(folder: Path) -> None:
    session = f"session_{os.getpid()}"
    (folder / session).mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    unused = (
        DASHBOARD_AGENT_LISTEN_PORT_NAME,
        METRICS_AGENT_PORT_NAME,
        METRICS_EXPORT_PORT_NAME,
    )
    for name in unused:
        persist_port(str(folder / session), _NODE_ID, name, -1)
    persist_port(str(folder / session), _NODE_ID, RUNTIME_ENV_AGENT_PORT_NAME, port)
    os.environ["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = _NODE_ID
    node = Node(
        RayParams(
            num_cpus=_CPUS,
            object_store_memory=_OBJECT_STORE_BYTES,
            temp_dir=str(folder),
            session_name=session,
            runtime_env_agent_port=port,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
        ),
        head=True,
    )
    print(f"ray is at {node.gcs_address}", flush=True)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
