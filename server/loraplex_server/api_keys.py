"""API keys: what each may do, with which adapters, how often; and the file that lists them.

A key belongs to a tenant. What a tenant adds is its own. What the operator adds is shared: the
operator's keys are those of options, and those of the file with scope ``admin`` that have neither
a list of adapters nor a tenant.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loraplex_adapter_store.names import TENANT_NAME, local_name, name_of, tenant_of
from loraplex_adapter_store.quota import NO_QUOTA, Quota

if TYPE_CHECKING:  # the command line reads this file, and cards import torch
    from loraplex_adapter_store.card import AdapterCard

__all__ = ["EVERY_ADAPTER", "GENERATED", "AdapterAccess", "ApiKey", "Scope", "parse_keys"]

GENERATED = "generated/"  # of names that the server chooses

_MAX_NAME = 256  # of an adapter, with its organisation
_QUOTAS = ("max_adapters", "max_bytes", "max_pins", "max_jobs")
_ENGINE_LIMITS = ("weight", "max_running", "max_queued")
_FIELDS = frozenset(
    {
        *("name", "tenant", "sha256", "scope", "adapters", "sources"),
        *("requests_per_minute", "tokens_per_minute", *_ENGINE_LIMITS),
        *_QUOTAS,
    }
)


class Scope(Enum):
    METRICS = "metrics"  # read /metrics, nothing else
    INFER = "infer"  # generate, list, read
    ADMIN = "admin"  # also: add, replace, remove and pin adapters


_SCOPES = {
    "metrics": frozenset({Scope.METRICS}),
    "infer": frozenset({Scope.INFER}),  # /metrics tells of all tenants
    "admin": frozenset(Scope),
}


@dataclass(frozen=True, slots=True)
class AdapterAccess:
    """Which adapters exist for a key, and where it may load from. The base model always exists.

    ``tenant`` None sees what all tenants have, with their names; what it adds is shared. "" sees
    only what is shared.
    """

    patterns: tuple[str, ...] | None = None  # as ``team-a/*``; ``*`` spans slashes; None: all
    sources: tuple[str, ...] | None = None  # the same, of what the operator allows; None: all
    tenant: str | None = None
    quota: Quota = NO_QUOTA  # of the tenant
    max_jobs: int | None = None  # of the tenant, that run at a time

    def own(self, name: str) -> str:
        """What the store calls the key's own adapter of this name."""
        return name_of(self.tenant or "", name)

    @property
    def sees_all(self) -> bool:
        """Every tenant's and every adapter's: what tells of the whole server is for it, too."""
        return self.patterns is None and self.tenant is None

    def owns(self, name: str) -> bool:
        """``name``: in the store, as of all methods below."""
        return self.tenant is None or tenant_of(name) == self.tenant

    def shown(self, name: str) -> str:
        """As the key's user knows it."""
        return local_name(name) if self.tenant and self.owns(name) else name

    def allows(self, name: str) -> bool:
        """Whether the adapter of this name, if there is one, exists for the key."""
        if not self.owns(name) and (tenant_of(name) or name.startswith(GENERATED)):
            return False
        if self.patterns is None:
            return True
        # Clients choose the names that come here: a long one is nobody's, and is not remembered.
        return len(name) <= _MAX_NAME and _matches(self.patterns, self.shown(name))

    def listed(self, cards: Iterable[AdapterCard]) -> list[AdapterCard]:
        """Those that exist for the key, by the names that its user knows."""
        allowed = (card for card in cards if self.allows(card.name))
        return sorted(allowed, key=lambda card: self.shown(card.name))

    @property
    def candidates(self) -> AdapterAccess:
        """For ``auto``: what tenants have is for their own requests, not for the operator's."""
        return self if self.tenant is not None else replace(self, tenant="")

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
    # What its tenant may take of the engine, see ``TenantShare``:
    weight: float | None = None
    max_running: int | None = None
    max_queued: int | None = None

    @staticmethod
    def of(secret: str, scope: Scope) -> ApiKey:
        """Of an option; ``scope`` includes the lesser ones."""
        digest = hashlib.sha256(secret.encode()).digest()
        id = hashlib.sha256(digest).hexdigest()[:8]
        access = AdapterAccess(tenant="") if scope is Scope.INFER else EVERY_ADAPTER
        return ApiKey(digest, _SCOPES[scope.value], id, id, access)


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
    return _with_quotas_of_tenants(keys)


def _with_quotas_of_tenants(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    """A quota that one key of a tenant states holds for all of them."""
    limits: dict[str, dict[str, Any]] = {}
    for key in keys:
        stated = {**asdict(key.access.quota), "max_jobs": key.access.max_jobs}
        stated |= {name: getattr(key, name) for name in _ENGINE_LIMITS}
        of_tenant = limits.setdefault(key.tenant, {})
        for what, limit in stated.items():
            if limit is not None and of_tenant.setdefault(what, limit) != limit:
                raise ValueError(f"two keys of tenant {key.tenant!r} have a different {what}")

    def with_quota(key: ApiKey) -> ApiKey:
        found = dict(limits[key.tenant])
        max_jobs = found.pop("max_jobs", None)
        of_engine = {name: found.pop(name, None) for name in _ENGINE_LIMITS}
        access = replace(key.access, quota=Quota(**found), max_jobs=max_jobs)
        return replace(key, access=access, **of_engine)

    return tuple(map(with_quota, keys))


def _key(number: int, table: object) -> ApiKey:
    where = f"key {number}"
    if not isinstance(table, dict):
        raise ValueError(f"{where} is no table: write [[key]]")
    name = table.get("name")
    if not isinstance(name, str) or not TENANT_NAME.fullmatch(name):
        raise ValueError(f"{where} needs a name of 1 to 64 characters: letters, digits, . _ -")
    where = f"key {name!r}"
    tenant = table.get("tenant", name)
    if not isinstance(tenant, str) or not TENANT_NAME.fullmatch(tenant):
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
        _access(where, table, scope, tenant),
        _limit(where, table, "requests_per_minute"),
        _limit(where, table, "tokens_per_minute"),
        _weight(where, table),
        _limit(where, table, "max_running"),
        _limit(where, table, "max_queued"),
    )


def _access(where: str, table: Mapping[str, object], scope: str, tenant: str) -> AdapterAccess:
    adapters = _patterns(where, table, "adapters")
    sources = _patterns(where, table, "sources")
    operators = scope == "admin" and adapters is None and "tenant" not in table
    if scope == "metrics" or operators:
        access = AdapterAccess(adapters, sources)
    else:  # without sources it would read those of others
        access = AdapterAccess(adapters, sources or (), tenant)
    limits = {what: _limit(where, table, what) for what in _QUOTAS}
    if access.tenant is None and any(limits.values()):
        raise ValueError(f"{where} is the operator's and has no quotas; give it a tenant")
    return replace(
        access,
        quota=Quota(limits["max_adapters"], limits["max_bytes"], limits["max_pins"]),
        max_jobs=limits["max_jobs"],
    )


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


def _weight(where: str, table: Mapping[str, object]) -> float | None:
    value = table.get("weight")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= 100:
        raise ValueError(f"{where}: weight must be a number from 0.01 to 100")
    return float(value)


@lru_cache(maxsize=65536)  # a listing asks for thousands of names
def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
