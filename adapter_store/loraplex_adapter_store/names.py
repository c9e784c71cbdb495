"""What an adapter may be called.

A name of a tenant is ``tenant:name`` in the store. The operator's names have no tenant; they are
what the operator shares.
"""

from __future__ import annotations

import re

from .errors import InvalidName

__all__ = [
    "RESERVED_ENDINGS",
    "RESERVED_NAMES",
    "TENANT_NAME",
    "check_name",
    "is_valid_name",
    "local_name",
    "name_of",
    "tenant_of",
]

# Words with a meaning of their own: in a request, and as routes that make an adapter.
RESERVED_NAMES = frozenset({"auto", "base", "generate", "train"})
# `/v1/adapters/x/pin` is an action on `x`, so that an adapter `x/pin` could not be reached.
RESERVED_ENDINGS = ("pin", "unpin", "warm", "unload", "revisions", "rollback", "routing")
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_RULE = (
    "1 to 128 characters of A-Z a-z 0-9 . _ / -, the first a letter or digit, no empty or dotted "
    "path segment"
)


def is_valid_name(name: str) -> bool:
    return _fault_of(name) is None


def check_name(name: str) -> str:
    """Returns ``name``, or raises InvalidName with the rule."""
    fault = _fault_of(name)
    if fault is not None:
        raise InvalidName(f"{name!r} is not an adapter name: {fault}")
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


def _fault_of(name: object) -> str | None:
    if not isinstance(name, str):
        return _RULE
    tenant, separator, local = name.rpartition(":")
    if separator and TENANT_NAME.fullmatch(tenant) is None:
        return _RULE
    segments = local.split("/")
    if _NAME.fullmatch(local) is None or not all(segment.strip(".") for segment in segments):
        return _RULE  # no empty, "." or ".." segment
    if local.lower() in RESERVED_NAMES:
        taken = ", ".join(sorted(RESERVED_NAMES))
        return f"{taken} mean something else in requests and routes; choose another name"
    if len(segments) > 1 and segments[-1] in RESERVED_ENDINGS:
        return (
            f"/v1/adapters/{local} is a route of {'/'.join(segments[:-1])!r}; choose a name that "
            f"does not end in /{segments[-1]}"
        )
    return None
