"""What an adapter may be called.

A name of a tenant is ``tenant:name`` in the store. The operator's names have no tenant; they are
what the operator shares.
"""

from __future__ import annotations

import re

from .errors import InvalidName

__all__ = [
    "RESERVED_NAMES",
    "TENANT_NAME",
    "check_name",
    "is_valid_name",
    "local_name",
    "name_of",
    "tenant_of",
]

RESERVED_NAMES = frozenset({"auto", "base"})  # words with a meaning of their own in a request
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def is_valid_name(name: str) -> bool:
    tenant, separator, local = name.rpartition(":")
    if separator and TENANT_NAME.fullmatch(tenant) is None:
        return False
    if _NAME.fullmatch(local) is None or local.lower() in RESERVED_NAMES:
        return False
    return all(segment.strip(".") for segment in local.split("/"))  # no empty, "." or ".." segment


def check_name(name: str) -> str:
    """Returns ``name``, or raises InvalidName with the rule."""
    if not isinstance(name, str) or not is_valid_name(name):
        raise InvalidName(
            f"{name!r} is not an adapter name: 1 to 128 characters of A-Z a-z 0-9 . _ / -, the "
            f"first a letter or digit, no empty or dotted path segment, "
            f"none of {sorted(RESERVED_NAMES)}"
        )
    return name


def name_of(tenant: str, local: str) -> str:
    """What the store calls the ``local`` name of ``tenant``; "" is the operator."""
    return f"{tenant}:{local}" if tenant else local


def tenant_of(name: str) -> str:
    """Empty for a name of the operator."""
    return name.rpartition(":")[0]


def local_name(name: str) -> str:
    """The name without its tenant."""
    return name.rpartition(":")[2]
