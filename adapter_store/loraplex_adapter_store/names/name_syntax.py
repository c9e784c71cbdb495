"""The syntax of adapter names.

The store calls a tenant's adapter ``tenant:name``. Names without a tenant are the operator's, which
all tenants share. Only names of fine-tuned models, ``ft:base:suffix:id``, hold colons of their own.
"""

import re

from loraplex_adapter_store.errors import InvalidName

# Words with another meaning in a request, or in routes that make an adapter.
RESERVED_NAMES = frozenset({"auto", "base", "generate", "train"})
# `/v1/adapters/x/pin` is an action on `x`, so an adapter `x/pin` could not be reached.
RESERVED_ENDINGS = ("pin", "unpin", "warm", "unload", "revisions", "rollback", "routing")
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

FINE_TUNED = "ft:"  # prefix of names that the server gives to fine-tuned models

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_PART = "[A-Za-z0-9._-]"
_FINE_TUNED_NAME = re.compile(rf"(?=.{{1,128}}$)ft:{_PART}+:{_PART}*:{_PART}+")
_RULE = (
    "1 to 128 characters of A-Z a-z 0-9 . _ / -, the first a letter or digit, no empty or dotted "
    "path segment"
)


def is_valid_name(name: str) -> bool:
    return _fault_of(name) is None


def check_name(name: str) -> str:
    """Return ``name``, or raise InvalidName with the rule."""
    fault = _fault_of(name)
    if fault is not None:
        raise InvalidName(f"{name!r} is not an adapter name: {fault}")
    return name


def name_of(tenant: str, local: str) -> str:
    """Return the store's name for the ``local`` name of ``tenant``; "" is the operator."""
    return f"{tenant}:{local}" if tenant else local


def tenant_of(name: str) -> str:
    """Return the tenant of a name; "" for the operator."""
    return name[: max(0, _local_start(name) - 1)]


def local_name(name: str) -> str:
    """Return the name without its tenant."""
    return name[_local_start(name) :]


def _local_start(name: str) -> int:
    """Return the index at which the local name begins. Takes a fraction of a microsecond."""
    n_colons = name.count(":")
    start = name.rfind(":") + 1
    if n_colons in (3, 4):
        local = 0 if n_colons == 3 else name.find(":") + 1
        start = local if name.startswith(FINE_TUNED, local) else start
    return start


def _fault_of(name: object) -> str | None:
    if not isinstance(name, str):
        return _RULE
    tenant, local = tenant_of(name), local_name(name)
    if local != name and TENANT_NAME.fullmatch(tenant) is None:
        return _RULE
    if _FINE_TUNED_NAME.fullmatch(local):
        return None
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
