"""The files of the console, as they come with the package."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

__all__ = ["ConsoleFile", "console_file", "is_console"]

_TYPES = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "favicon.svg": "image/svg+xml",
    "index.html": "text/html; charset=utf-8",
}


class ConsoleFile(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def is_console(path: str) -> bool:
    """Whether a request's path is one of the console's."""
    return path == "/" or path.startswith("/console/")


@lru_cache(maxsize=8)
def console_file(name: str) -> ConsoleFile | None:
    """None if there is no such file."""
    if name not in _TYPES:
        return None
    content = (files("loraplex_server") / "console" / name).read_bytes()
    return ConsoleFile(content, _TYPES[name], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
