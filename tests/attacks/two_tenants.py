"""Two tenants of one server: one floods it, and the waits of the other are measured."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.support.servers.server_process import ServerProcess, server_process


class Tenant(NamedTuple):
    http: httpx.Client

    def post(self, path: str, body: dict[str, Any], *statuses: int) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code in (statuses or (200,)), answer.text
        return answer.json()

    def put(self, name: str, folder: Path, *statuses: int, **files: bytes) -> None:
        parts = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        answer = self.http.put(f"/v1/adapters/{name}", files={**parts, **files})
        assert answer.status_code in (statuses or (200, 201)), answer.text


class Neighbours(NamedTuple):
    flood: Tenant
    small: Tenant
    server: ServerProcess
    folder: Path


@contextmanager
def two_tenants(folder: Path, model: Path, *flags: str, web_url: str = "") -> Iterator[Neighbours]:
    """Yield a server of ``model`` with two tenants that may download from ``web_url``."""
    keys = folder / "keys.toml"
    keys.write_text(keys_of("flood", "small", web_url=web_url))
    with (
        server_process(model, folder / "state", "--keys", keys, *flags) as server,
        tenant_of(server.url, "flood") as flood,
        tenant_of(server.url, "small") as small,
    ):
        yield Neighbours(flood, small, server, folder)


def keys_of(*names: str, web_url: str) -> str:
    """Return a keys file in which each tenant's name is its key."""
    sources = f'sources = ["{web_url}/*"]\n' if web_url else ""
    return "\n".join(
        f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        f'tenant = "{name}"\nscope = "admin"\n{sources}'
        for name in names
    )


@contextmanager
def tenant_of(url: str, name: str) -> Iterator[Tenant]:
    headers, limits = {"authorization": f"Bearer {name}"}, httpx.Limits(max_connections=200)
    with httpx.Client(base_url=url, headers=headers, timeout=600, limits=limits) as http:
        yield Tenant(http)


def waited(calls: Sequence[Callable[[], object]], small: Callable[[], object]) -> float:
    """Run the calls at once, and ``small`` again and again meanwhile.

    Return the longest wait of ``small`` as a share of the time that the calls took.
    """
    small()  # the first call loads and compiles
    with ThreadPoolExecutor(len(calls)) as pool:
        began = time.monotonic()
        running = [pool.submit(call) for call in calls]
        longest_s, n_small = 0.0, 0
        while not all(call.done() for call in running):
            sent = time.monotonic()
            small()
            longest_s = max(longest_s, time.monotonic() - sent)
            n_small += 1
        took_s = time.monotonic() - began
    for call in running:
        call.result()
    print(f"{n_small} calls beside {len(calls)}: {longest_s:.2f} s of {took_s:.2f} s")
    assert n_small > 2
    return longest_s / took_s
