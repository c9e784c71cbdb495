"""What an adapter may be called."""

from __future__ import annotations

import re

from .errors import InvalidName

__all__ = ["RESERVED_NAMES", "check_name", "is_valid_name"]

RESERVED_NAMES = frozenset({"auto", "base"})  # words with a meaning of their own in a request

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def is_valid_name(name: str) -> bool:
    if _NAME.fullmatch(name) is None or name.lower() in RESERVED_NAMES:
        return False
    return all(segment.strip(".") for segment in name.split("/"))  # no empty, "." or ".." segment


def check_name(name: str) -> str:
    """Returns ``name``, or raises InvalidName with the rule."""
    if not isinstance(name, str) or not is_valid_name(name):
        raise InvalidName(
            f"{name!r} is not an adapter name: 1 to 128 characters of A-Z a-z 0-9 . _ / -, the "
            f"first a letter or digit, no empty or dotted path segment, "
            f"none of {sorted(RESERVED_NAMES)}"
        )
    return name
