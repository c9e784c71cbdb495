"""API keys: their scopes, adapters and limits, and the file that lists them.

A key belongs to a tenant, who owns the adapters that it adds. Adapters of the operator are shared.
The operator's keys are those of options, and keys of the file with ``operator = true``.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loraplex_adapter_store.names.name_syntax import TENANT_NAME, local_name, name_of, tenant_of
from loraplex_adapter_store.names.put_options import NO_QUOTA, Quota

if TYPE_CHECKING:  # the command line reads this file, and cards import torch
    from loraplex_adapter_store.names.card import AdapterCard

GENERATED = "generated/"  # prefix of names that the server chooses

_MAX_NAME = 256  # characters of an adapter name with its organisation
_JOB_LIMITS = ("max_jobs", "max_training_tokens")
_QUOTAS = ("max_adapters", "max_bytes", "max_pins", *_JOB_LIMITS)
_ENGINE_LIMITS = ("weight", "max_running", "max_queued")
_log = logging.getLogger(__name__)
_FIELDS = frozenset(
    {
        *("name", "tenant", "operator", "sha256", "scope", "adapters", "sources"),
        *("requests_per_minute", "tokens_per_minute", *_ENGINE_LIMITS),
        *_QUOTAS,
    }
)


class Scope(Enum):
    METRICS = "metrics"  # only read /metrics
    INFER = "infer"  # generate, list and read
    ADMIN = "admin"  # also add, replace, remove and pin adapters


_SCOPES = {
    "metrics": frozenset({Scope.METRICS}),
    "infer": frozenset({Scope.INFER}),  # /metrics shows all tenants
    "admin": frozenset(Scope),
}


@dataclass(frozen=True, slots=True)
class AdapterAccess:
    """The adapters that a key may use, and the sources that it may load from.

    ``tenant`` None is the operator, who sees the adapters of all tenants. "" sees only shared
    adapters.
    """

    patterns: tuple[str, ...] | None = None  # like ``team-a/*``; ``*`` spans slashes; None: all
    sources: tuple[str, ...] | None = None  # patterns of sources; None: all that are allowed
    tenant: str | None = None
    quota: Quota = NO_QUOTA  # shared by the tenant's keys
    max_jobs: int | None = None  # running jobs of the tenant
    max_training_tokens: int | None = None  # of the tenant's fine-tuning jobs of a day

    def own(self, name: str) -> str:
        """Return the stored name of the tenant's own adapter."""
        return name_of(self.tenant or "", name)

    @property
    def sees_all(self) -> bool:
        """True if the key sees every adapter of every tenant, and the state of the whole server."""
        return self.patterns is None and self.tenant is None

    def owns(self, name: str) -> bool:
        """Return True if the tenant owns the stored ``name``. Methods below take stored names."""
        return self.tenant is None or tenant_of(name) == self.tenant

    def shown(self, name: str) -> str:
        """Return the name that users of the key see."""
        return local_name(name) if self.tenant and self.owns(name) else name

    def allows(self, name: str) -> bool:
        """Return True if the key may use an adapter of this name."""
        if not self.owns(name) and (tenant_of(name) or name.startswith(GENERATED)):
            return False
        if self.patterns is None:
            return True
        # Clients choose the names, so long names are refused before they reach the cache.
        return len(name) <= _MAX_NAME and _matches(self.patterns, self.shown(name))

    def listed(self, cards: Iterable[AdapterCard]) -> list[AdapterCard]:
        """Return the adapters that the key may use, sorted by the names that its users see."""
        allowed = (card for card in cards if self.allows(card.name))
        return sorted(allowed, key=lambda card: self.shown(card.name))

    @property
    def candidates(self) -> AdapterAccess:
        """The access of ``auto``: adapters of tenants do not answer the operator's requests."""
        return self if self.tenant is not None else replace(self, tenant="")

    def allows_source(self, source: str) -> bool:
        """Return True if the key may load ``source``, an address or a relative folder."""
        if self.sources is None:
            return True
        return any(fnmatchcase(source, pattern) for pattern in self.sources)


EVERY_ADAPTER = AdapterAccess()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key by its hash. Keys of one ``tenant`` share its adapters and limits."""

    sha256: bytes = field(repr=False)
    scopes: frozenset[Scope]
    id: str
    tenant: str
    access: AdapterAccess = EVERY_ADAPTER
    requests_per_minute: int | None = None  # None: no limit
    tokens_per_minute: int | None = None  # prompts and answers together
    # Limits of the tenant in the engine, see ``TenantShare``:
    weight: float | None = None
    max_running: int | None = None
    max_queued: int | None = None

    @staticmethod
    def of(secret: str, scope: Scope) -> ApiKey:
        """Return the key of an option. ``admin`` includes the other scopes."""
        digest = hashlib.sha256(secret.encode()).digest()
        id = hashlib.sha256(digest).hexdigest()[:8]
        access = AdapterAccess(tenant="") if scope is Scope.INFER else EVERY_ADAPTER
        return ApiKey(digest, _SCOPES[scope.value], id, id, access)


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """Parse the ``[[key]]`` tables of a TOML file. Raises ValueError, which repeats no value."""
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


def log_admins(keys: Iterable[ApiKey]) -> None:
    """Log which admin keys see all tenants, and which see one. Warns if no key sees all."""
    admins = [key for key in keys if Scope.ADMIN in key.scopes]
    operators = [key.id for key in admins if key.access.sees_all]
    others = [f"{key.id} of tenant {key.tenant}" for key in admins if not key.access.sees_all]
    if admins:
        _log.log(
            logging.INFO if operators else logging.WARNING,
            "admin keys that see all tenants: %s; that see their tenant and shared adapters: %s "
            "(`operator = true` in the keys file lets a key see all tenants)",
            ", ".join(operators) or "none",
            ", ".join(others) or "none",
        )


def _with_quotas_of_tenants(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    """Apply a limit that one key states to all keys of its tenant."""
    limits: dict[str, dict[str, Any]] = {}
    for key in keys:
        stated = asdict(key.access.quota)
        stated |= {name: getattr(key.access, name) for name in _JOB_LIMITS}
        stated |= {name: getattr(key, name) for name in _ENGINE_LIMITS}
        of_tenant = limits.setdefault(key.tenant, {})
        for what, limit in stated.items():
            if limit is not None and of_tenant.setdefault(what, limit) != limit:
                raise ValueError(f"two keys of tenant {key.tenant!r} have a different {what}")

    def with_quota(key: ApiKey) -> ApiKey:
        quota = dict(limits[key.tenant])
        of_jobs = {name: quota.pop(name, None) for name in _JOB_LIMITS}
        of_engine = {name: quota.pop(name, None) for name in _ENGINE_LIMITS}
        access = replace(key.access, quota=Quota(**quota), **of_jobs)
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
    operator = table.get("operator", False)
    if not isinstance(operator, bool):
        raise ValueError(f"{where}: operator must be true or false")
    if operator and (scope != "admin" or not table.keys().isdisjoint({"tenant", "adapters"})):
        raise ValueError(
            f'{where}: operator = true needs scope = "admin" and excludes tenant and adapters'
        )
    if scope == "metrics" or operator:
        access = AdapterAccess(adapters, sources)
    else:  # without sources the key could read those of other tenants
        access = AdapterAccess(adapters, sources or (), tenant)
    limits = {what: _limit(where, table, what) for what in _QUOTAS}
    if access.tenant is None and any(limits.values()):
        raise ValueError(f"{where} belongs to no tenant and has no quotas; give it a tenant")
    return replace(
        access,
        quota=Quota(limits["max_adapters"], limits["max_bytes"], limits["max_pins"]),
        max_jobs=limits["max_jobs"],
        max_training_tokens=limits["max_training_tokens"],
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
