"""Checks that the operator allows the source that a client names."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapter_store.errors import SourceError
from loraplex_adapter_store.sources.prefix import SourcePrefix, canonical_uri
from loraplex_server.errors import ApiError, from_store, invalid, not_found
from loraplex_server.settings.api_keys import AdapterAccess


@dataclass(frozen=True, slots=True)
class AllowedSources:
    """The sources that the operator allows: address prefixes and directories."""

    prefixes: Sequence[SourcePrefix]
    roots: Sequence[Path]  # resolved


def source_uri(allowed: AllowedSources, access: AdapterAccess, source: str, *, param: str) -> str:
    """Return the canonical address of ``source``, or its directory with every link resolved.

    ``access`` belongs to the API key and may narrow the allowed sources. Raises ApiError: 403 for
    every source outside, existing or not, so that nobody can probe the file system or the
    network; 400 or 404 for a malformed or missing source inside.
    """
    if "\0" in source:
        raise invalid("a source must not contain NUL", param)
    scheme, separator, rest = source.partition("://")
    if separator and scheme != "file":
        return _address(allowed, access, source, param)
    return _directory(allowed, access, Path(rest if separator else source), source, param)


def _address(allowed: AllowedSources, access: AdapterAccess, source: str, param: str) -> str:
    try:
        uri = canonical_uri(source)
    except SourceError as error:
        raise from_store(error, param=param) from error
    if not any(prefix.covers(uri) for prefix in allowed.prefixes):
        raise _forbidden(source, "--allow-source PREFIX", param)
    if not access.allows_source(uri):
        raise _forbidden(source, "sources of the API key", param)
    return uri


def _directory(
    allowed: AllowedSources, access: AdapterAccess, path: Path, source: str, param: str
) -> str:
    """Return the first allowed directory that holds ``path``."""
    roots = allowed.roots
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    inside = [
        real
        for candidate in candidates
        if (real := _resolved(candidate)) is not None
        and any(real.is_relative_to(root) for root in roots)
    ]
    if not inside:
        raise _forbidden(source, "--adapters-dir", param)
    inside = [real for real in inside if _is_of_key(real, roots, access)]
    if not inside:
        raise _forbidden(source, "sources of the API key", param)
    for real in inside:
        if os.path.isdir(real):  # False also where it may not be looked at
            return str(real)
    raise not_found(
        f"there is no adapter directory {source[:200]!r} below the directories that this server "
        "reads",
        param,
        "source_not_found",
    )


def _is_of_key(real: Path, roots: Sequence[Path], access: AdapterAccess) -> bool:
    return any(
        access.allows_source(real.relative_to(root).as_posix())
        for root in roots
        if real.is_relative_to(root)
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
