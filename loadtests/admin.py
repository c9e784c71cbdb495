"""Adapters through the admin API: upload, warm, delete, and churn under load."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

_FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


def upload_adapter(
    client: httpx.Client,
    name: str,
    folder: Path,
    *,
    replace: bool = False,
    params: Mapping[str, int] | None = None,
) -> None:
    """Upload as multipart. Raises RuntimeError, also if the name is taken without ``replace``.

    ``params``: of the query.
    """
    files = {field: (file, (folder / file).read_bytes()) for field, file in _FILES.items()}
    headers = {} if replace else {"If-None-Match": "*"}
    response = client.put(f"/v1/adapters/{name}", files=files, headers=headers, params=params)
    if response.status_code == 412:
        raise RuntimeError(
            f"the server has an adapter {name} already, which this would replace and remove; "
            "remove it first, or leave out --url for a server of its own"
        )
    _check(response, f"PUT {name}")


def warm_adapter(client: httpx.Client, name: str) -> None:
    """Load the adapter to host memory and to the device. Raises RuntimeError."""
    _check(client.post(f"/v1/adapters/{name}/warm"), f"warm {name}")


def delete_adapter(client: httpx.Client, name: str) -> int:
    """Return the status: 200, or 404 if the server has no adapter of that name."""
    return client.delete(f"/v1/adapters/{name}", params={"timeout_s": 5}).status_code


def _check(response: httpx.Response, what: str) -> None:
    if response.is_error:
        raise RuntimeError(f"{what}: {response.status_code} {response.text[:300]}")


class Churn:
    """A loop that adds an adapter, replaces its weights and removes the oldest."""

    def __init__(self, client: httpx.Client, variants: Sequence[Path], per_s: float) -> None:
        """``variants``: the directories of an adapter and of its replacement."""
        self.names: list[str] = []  # registered right now
        self.removed: set[str] = set()
        self.counts = {"added": 0, "replaced": 0, "removed": 0, "failed": 0}
        self.first_failure: str | None = None
        self._client = client
        self._variants = variants
        self._pause_s = 1.0 / per_s
        self._turn = 0

    def run(self, stop_at: float) -> None:
        """Run until ``time.perf_counter()`` is ``stop_at``, then remove all adapters."""
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
                upload_adapter(self._client, name, self._variants[0])
                self.names.append(name)
                self.counts["added"] += 1
            elif kind == 1:
                upload_adapter(self._client, self.names[-1], self._variants[1], replace=True)
                self.counts["replaced"] += 1
            elif len(self.names) > 2:
                self._remove(self.names[0])
        except Exception as error:
            self.counts["failed"] += 1
            self.first_failure = self.first_failure or str(error)[:300]

    def _remove(self, name: str) -> None:
        self.names.remove(name)
        self.removed.add(name)  # first: a request that is under way may get a 404
        if delete_adapter(self._client, name) == 200:
            self.counts["removed"] += 1
