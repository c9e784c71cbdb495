"""Adapters through the admin API: uploads, removal, and churn while the server is under load."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .streaming import Connections

__all__ = ["Churn", "delete_adapter", "upload_adapter", "warm_adapter"]


def upload_adapter(connections: Connections, name: str, folder: Path) -> None:
    """PUT as multipart. Raises RuntimeError with the server's words."""
    boundary = uuid.uuid4().hex
    parts = []
    for field, file in (
        ("config", folder / "adapter_config.json"),
        ("weights", folder / "adapter_model.safetensors"),
    ):
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; '
            f'filename="{file.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        parts += [head.encode(), file.read_bytes(), b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    status, answer = connections.send(
        "PUT",
        f"/v1/adapters/{quote(name)}",
        b"".join(parts),
        f"multipart/form-data; boundary={boundary}",
    )
    if status >= 300:
        raise RuntimeError(f"PUT {name}: {status} {answer[:300].decode(errors='replace')}")


def warm_adapter(connections: Connections, name: str) -> None:
    """To host and device. Raises RuntimeError."""
    status, answer = connections.send("POST", f"/v1/adapters/{quote(name)}/warm")
    if status >= 300:
        raise RuntimeError(f"warm {name}: {status} {answer[:300].decode(errors='replace')}")


def delete_adapter(connections: Connections, name: str) -> int:
    """The status: 200, or 404 if it was not there."""
    return connections.send("DELETE", f"/v1/adapters/{quote(name)}?timeout_s=5")[0]


class Churn:
    """Goes round: add, replace by other weights, remove. ``names`` are registered right now."""

    def __init__(self, connections: Connections, variants: Sequence[Path], per_s: float) -> None:
        self.names: list[str] = []
        self.gone: set[str] = set()
        self.counts = {"added": 0, "replaced": 0, "removed": 0, "failed": 0}
        self.first_failure: str | None = None
        self._connections = connections
        self._variants = variants
        self._pause_s = 1.0 / per_s
        self._turn = 0

    def run(self, stop_at: float) -> None:
        """Until ``time.perf_counter()`` is ``stop_at``; leaves nothing behind."""
        while time.perf_counter() < stop_at:
            began = time.perf_counter()
            self._step()
            time.sleep(max(0.0, self._pause_s - (time.perf_counter() - began)))
        while self.names:
            self._remove(self.names[0])

    def _step(self) -> None:
        kind = self._turn % 3
        self._turn += 1
        try:
            if kind == 0 or not self.names:
                name = f"churn-{self._turn}"
                upload_adapter(self._connections, name, self._variants[0])
                self.names.append(name)
                self.counts["added"] += 1
            elif kind == 1:
                upload_adapter(self._connections, self.names[-1], self._variants[1])
                self.counts["replaced"] += 1
            elif len(self.names) > 2:
                self._remove(self.names[0])
        except Exception as error:
            self.counts["failed"] += 1
            self.first_failure = self.first_failure or str(error)[:300]

    def _remove(self, name: str) -> None:
        self.names.remove(name)
        self.gone.add(name)  # before it is: a request that is under way may find it gone
        if delete_adapter(self._connections, name) == 200:
            self.counts["removed"] += 1
