"""What a client may name as the source of an adapter: never a path of its own choosing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import ApiError, invalid

__all__ = ["source_uri"]


def source_uri(source: str, roots: Sequence[Path], *, param: str) -> str:
    """A URI as it is; a path only if it lies, links followed, below one of ``roots``.

    A relative name is looked up in each root. Raises ApiError: the same for "outside" and "not
    there", so that nobody can probe the file system.
    """
    if "\0" in source:
        raise invalid("a source must not contain NUL", param)
    scheme, separator, rest = source.partition("://")
    if separator and scheme != "file":
        return source
    path = Path(rest if separator else source)
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    for candidate in candidates:
        resolved = candidate.resolve()
        if resolved.is_dir() and any(resolved.is_relative_to(root) for root in roots):
            return str(resolved)
    raise ApiError(
        404,
        f"there is no adapter directory {source[:200]!r} below the directories this server may "
        "read; the operator adds one with --adapters-dir",
        code="source_not_found",
        param=param,
    )
