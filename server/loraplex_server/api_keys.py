"""API keys: what each may do, with which adapters, how often; and the file that lists them."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache

__all__ = ["EVERY_ADAPTER", "AdapterAccess", "ApiKey", "Scope", "parse_keys"]

_MAX_NAME = 256  # of an adapter, with its organisation
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIELDS = frozenset(
    {
        *("name", "tenant", "sha256", "scope", "adapters", "sources"),
        *("requests_per_minute", "tokens_per_minute"),
    }
)


class Scope(Enum):
    METRICS = "metrics"  # read /metrics, nothing else
    INFER = "infer"  # generate, list, read; /metrics too, unless the key is limited to adapters
    ADMIN = "admin"  # also: add, replace, remove and pin adapters


_SCOPES = {
    "metrics": frozenset({Scope.METRICS}),
    "infer": frozenset({Scope.METRICS, Scope.INFER}),
    "admin": frozenset(Scope),
}


@dataclass(frozen=True, slots=True)
class AdapterAccess:
    """Which adapters exist for a key, and where it may load from. The base model always exists."""

    patterns: tuple[str, ...] | None = None  # as ``team-a/*``; ``*`` spans slashes; None: all
    sources: tuple[str, ...] | None = None  # the same, of what the operator allows; None: all

    def allows(self, name: str) -> bool:
        if self.patterns is None:
            return True
        # Clients choose the names that come here: a long one is nobody's, and is not remembered.
        return len(name) <= _MAX_NAME and _matches(self.patterns, name)

    def allows_source(self, source: str) -> bool:
        """``source``: an address, or a directory relative to its ``--adapters-dir``."""
        if self.sources is None:
            return True
        return any(fnmatchcase(source, pattern) for pattern in self.sources)


EVERY_ADAPTER = AdapterAccess()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Only the hash is kept; ``id`` tells keys apart. Keys of one ``tenant`` share what it has."""

    sha256: bytes = field(repr=False)
    scopes: frozenset[Scope]
    id: str
    tenant: str
    access: AdapterAccess = EVERY_ADAPTER
    requests_per_minute: int | None = None  # None: no limit
    tokens_per_minute: int | None = None  # of prompts and answers together

    @staticmethod
    def of(secret: str, scope: Scope) -> ApiKey:
        """Of an option; ``scope`` includes the lesser ones."""
        digest = hashlib.sha256(secret.encode()).digest()
        id = hashlib.sha256(digest).hexdigest()[:8]
        return ApiKey(digest, _SCOPES[scope.value], id, tenant=id)


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The ``[[key]]`` tables of a TOML file. Raises ValueError, which repeats no value."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML: {error}") from None
    tables = document.get("key")
    if set(document) != {"key"} or not isinstance(tables, list):
        raise ValueError("the file must hold [[key]] tables and nothing else")
    keys = tuple(_key(number, table) for number, table in enumerate(tables, start=1))
    for what, values in (("name", [k.id for k in keys]), ("sha256", [k.sha256 for k in keys])):
        if len(set(values)) != len(values):
            raise ValueError(f"two keys have the same {what}")
    return keys


def _key(number: int, table: object) -> ApiKey:
    where = f"key {number}"
    if not isinstance(table, dict):
        raise ValueError(f"{where} is no table: write [[key]]")
    name = table.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where} needs a name of 1 to 64 characters: letters, digits, . _ -")
    where = f"key {name!r}"
    tenant = table.get("tenant", name)
    if not isinstance(tenant, str) or not _NAME.fullmatch(tenant):
        raise ValueError(f"{where}: tenant must be 1 to 64 characters: letters, digits, . _ -")
    if unknown := sorted(set(table) - _FIELDS):
        raise ValueError(f"{where} has unknown fields {unknown}; known: {sorted(_FIELDS)}")
    digest = table.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError(f"{where}: sha256 must be 64 hex digits (printf %s KEY | sha256sum)")
    scope = table.get("scope")
    if not isinstance(scope, str) or scope not in _SCOPES:
        raise ValueError(f"{where}: scope must be one of {', '.join(_SCOPES)}")
    return ApiKey(
        bytes.fromhex(digest),
        _SCOPES[scope],
        name,
        tenant,
        _access(where, table),
        _limit(where, table, "requests_per_minute"),
        _limit(where, table, "tokens_per_minute"),
    )


def _access(where: str, table: Mapping[str, object]) -> AdapterAccess:
    adapters = _patterns(where, table, "adapters")
    sources = _patterns(where, table, "sources")
    if adapters is not None and sources is None:
        sources = ()  # a key of some adapters would else read those of others from their source
    return AdapterAccess(adapters, sources)


def _patterns(where: str, table: Mapping[str, object], name: str) -> tuple[str, ...] | None:
    if name not in table:
        return None
    patterns = table[name]
    if not isinstance(patterns, list) or not all(p and isinstance(p, str) for p in patterns):
        raise ValueError(f'{where}: {name} must be a list of names or patterns, as ["team-a/*"]')
    return tuple(patterns)


def _limit(where: str, table: Mapping[str, object], name: str) -> int | None:
    value = table.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name} must be a whole number of at least 1")
    return value


@lru_cache(maxsize=65536)  # a listing asks for thousands of names
def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
