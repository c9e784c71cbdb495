"""What a client may name as the source of an adapter: only what the operator allowed."""

from __future__ import annotations

import os
from pathlib import Path

from loraplex_adapter_store.errors import SourceError
from loraplex_adapter_store.sources.prefix import canonical_uri
from loraplex_server.api.errors import ApiError, from_store, invalid, not_found
from loraplex_server.api.state import AppState

__all__ = ["source_uri"]


def source_uri(services: AppState, source: str, *, param: str) -> str:
    """The canonical address of ``source``, or its directory with every link followed.

    Raises ApiError: 403 for what lies outside, whether it exists or not, so that nobody can probe
    the file system or the network; 400 and 404 for what is malformed or missing inside.
    """
    if "\0" in source:
        raise invalid("a source must not contain NUL", param)
    scheme, separator, rest = source.partition("://")
    if separator and scheme != "file":
        return _address(services, source, param)
    return _directory(services, Path(rest if separator else source), source, param)


def _address(services: AppState, source: str, param: str) -> str:
    try:
        uri = canonical_uri(source)
    except SourceError as error:
        raise from_store(error, param=param) from error
    if not any(prefix.covers(uri) for prefix in services.config.store.allow_sources):
        raise _forbidden(source, "--allow-source PREFIX", param)
    return uri


def _directory(services: AppState, path: Path, source: str, param: str) -> str:
    """A relative name is looked up in each of the allowed directories."""
    roots = services.store.allowed_roots
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    inside = [
        real
        for candidate in candidates
        if (real := _resolved(candidate)) is not None
        and any(real.is_relative_to(root) for root in roots)
    ]
    if not inside:
        raise _forbidden(source, "--adapters-dir", param)
    for real in inside:
        if os.path.isdir(real):  # False also where it may not be looked at
            return str(real)
    raise not_found(
        f"there is no adapter directory {source[:200]!r} below the directories that this server "
        "reads",
        param,
        "source_not_found",
    )


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links, a name too long
        return None


def _forbidden(source: str, option: str, param: str) -> ApiError:
    return ApiError(
        403,
        f"this server does not load adapters from {source[:200]!r}; the operator allows it with "
        f"{option}",
        code="source_forbidden",
        param=param,
    )
