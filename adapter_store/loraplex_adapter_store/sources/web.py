"""A folder on a web server: ``https://host/path``. Redirects are refused, never followed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_adapter_store.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import LimitExceeded, SourceError
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.report import JsonValue

from .library_errors import told
from .local import OPTIONAL_FILES, LocalFiles, read_directory

if TYPE_CHECKING:
    import httpx

__all__ = ["fetch_web"]

_TIMEOUT_S = 60.0  # to connect, and between two pieces


def fetch_web(uri: str, into: Path, limits: StoreLimits) -> tuple[LocalFiles, dict[str, JsonValue]]:
    """A redirect could lead from an allowed server to any other, inside the network too."""
    import httpx

    etags: dict[str, JsonValue] = {}
    with httpx.Client(follow_redirects=False, timeout=_TIMEOUT_S) as client:
        for name, limit, needed in (
            (CONFIG_FILE, limits.max_config_bytes, True),
            (WEIGHTS_FILE, limits.max_file_bytes, True),
            *((n, limits.max_config_bytes, False) for n in OPTIONAL_FILES),
        ):
            (into / name).parent.mkdir(exist_ok=True)
            address = f"{uri.rstrip('/')}/{name}"
            try:
                with client.stream("GET", address) as answer:
                    if answer.status_code == 404 and not needed:
                        continue
                    _check(answer, address)
                    _save(answer, into / name, limit)
                    etags[name] = answer.headers.get("etag")
            except httpx.HTTPError as error:
                raise SourceError(f"cannot read {address}: {told(error)}") from None
    provenance: dict[str, JsonValue] = {"source": "web", "uri": uri, "etags": etags}
    return read_directory(into, limits), provenance


def _check(answer: httpx.Response, address: str) -> None:
    if answer.is_redirect:
        where = answer.headers["location"]
        raise SourceError(f"{address} redirects to {where[:200]!r}: name the final address")
    if answer.status_code != 200:
        raise SourceError(f"{address} answered {answer.status_code}")


def _save(answer: httpx.Response, target: Path, limit: int) -> None:
    n_bytes = 0
    with target.open("xb") as file:
        for chunk in answer.iter_bytes():
            n_bytes += len(chunk)
            if n_bytes > limit:
                raise LimitExceeded(f"{target.name} exceeds {limit} bytes")
            file.write(chunk)
