"""From a URI to local files: directory, file://, hf://, https://, object stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from loraplex_adapter_store.errors import SourceError
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.report import JsonValue

from .local import LocalFiles, contained, read_directory

__all__ = ["Fetched", "fetch"]


class Fetched(NamedTuple):
    files: LocalFiles
    provenance: Mapping[str, JsonValue]


def fetch(uri: str, into: Path, allowed_roots: Sequence[Path], limits: StoreLimits) -> Fetched:
    """Brings an adapter's files to ``into`` (or finds them locally). Raises SourceError."""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("", "file"):
        path = Path(unquote(urlsplit(uri).path)) if scheme else Path(uri)
        real = contained(path, allowed_roots)
        provenance: dict[str, JsonValue] = {"source": "directory", "path": str(real)}
        return Fetched(read_directory(real, limits), provenance)
    if scheme == "hf":
        from .hub import fetch_hub

        return Fetched(*fetch_hub(uri, into, limits))
    if scheme in ("http", "https"):
        from .web import fetch_web

        return Fetched(*fetch_web(uri, into, limits))
    if scheme in ("s3", "gs", "az"):
        from .objects import fetch_objects

        return Fetched(*fetch_objects(uri, into, limits))
    raise SourceError(
        f"unknown scheme {scheme!r} of {uri!r}; known: a directory, file, hf, s3, gs, az, https"
    )
