"""Generates adapters from descriptions, stores them, and lets them expire.

request ──► key ──► stored already? ──► its name      (its expiry is renewed)
                    else generate ──► store ──► name  (the first to expire makes room)

The store keeps the expiry of each name, so a restart changes nothing. A thread removes the names.
"""

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from loraplex_adapter_store.errors import RevisionConflict, StoreError, UnknownAdapter
from loraplex_adapter_store.names.card import AdapterCard, CardEdit
from loraplex_adapter_store.names.name_syntax import local_name, name_of, tenant_of
from loraplex_adapter_store.names.put_options import NO_QUOTA, PutOptions, Quota
from loraplex_adapter_store.part_log import worked
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.generated import GeneratedAdapter, Generator
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.errors import ApiError, unavailable
from loraplex_server.settings.api_keys import GENERATED

from .learning_record import Record, record_of

_LONGEST_WAIT_S = 60.0  # the clock may be set while the reaper waits
_RETRY_S = 5.0
_MAX_PROMPTS = 100  # shown on a card
# A renewal that moves the expiry by less than this share of the lifetime is not written: in a
# catalogue each write is an object, and a description may be sent many times a second.
_LEAST_MOVE = 0.05
_log = logging.getLogger(__name__)
Make = Callable[[], GeneratedAdapter]  # blocks; raises GeneratorError


@dataclass(slots=True)
class GenerationStats:
    """Counts of generation requests."""

    n_made: int = 0
    n_reused: int = 0
    n_refused: int = 0
    seconds: float = 0.0  # spent on generating, checking and storing the adapters of n_made


class GeneratedAdapters:
    """Owner of the generated names. Thread-safe; calls take tens of milliseconds and may block."""

    def __init__(
        self,
        store: AdapterStore,
        find_generator: Callable[[], Generator],
        *,
        ttl_s: float = 3600.0,
        quota: int = 64,
        clock: Callable[[], float] = time.time,
        runs: Callable[[str], bool] = lambda job: True,
    ) -> None:
        """``find_generator`` loads the generator on its first call and returns it.

        ``quota``: the largest number of ``generated/…`` names of a tenant. ``clock``: seconds since
        the epoch. ``runs``: returns True if the job with this id still runs; any thread.
        """
        self._store, self._find_generator = store, find_generator
        self._ttl_s, self._quota, self._clock = ttl_s, quota, clock
        self._runs = runs
        self.stats = GenerationStats()  # written under the lock; /metrics reads without the lock
        self._digests: dict[str, str] = {}  # by key of a generated adapter; under the lock
        self._lock = threading.Lock()  # one generation at a time, so that equal requests share it
        self._changed = threading.Condition()  # the next expiry changed, or ``close`` was called
        self._closed = False
        for card in store.cards.all():  # stored by a version without expiries
            if _is_ours(card.name) and card.expires is None:
                store.set_expiry(card.name, clock() + ttl_s)
        self._reaper = threading.Thread(target=self._reap, name="loraplex-expiry", daemon=True)
        self._reaper.start()

    def ensure(
        self,
        request: AdapterGenerationRequest,
        *,
        tenant: str = "",
        name: str | None = None,
        ttl_s: float | None = None,
        quota: Quota = NO_QUOTA,
        provenance: Mapping[str, JsonValue] = MappingProxyType({}),
        busy_s: float = 0.0,
        make: Make | None = None,
    ) -> AdapterCard:
        """Return the adapter of a request: the stored one with a renewed expiry, or a new one.

        ``name`` is chosen by the caller and must be free. It lives until it is deleted, unless
        ``ttl_s`` is given. Other names expire after ``ttl_s`` (one hour by default). ``busy_s`` is
        added to the lifetime for a job that improves the adapter. ``provenance`` is added to the
        card of a new adapter. ``make`` makes it; None: the generator. Raises OutOfDistribution,
        NotTrained, GeneratorMismatch, UnfitPrompts, RevisionConflict and other StoreErrors.
        """
        with self._lock:
            ours = self.unnamed(request, tenant)
            expires = self._expiry(name or ours, ttl_s, busy_s)
            card = None if name else self._refreshed(ours, busy_s + (ttl_s or self._ttl_s))
            if card is None:
                if name or not self._next_evicted(tenant):  # else it replaces another adapter
                    self._store.check_quota(name or ours, quota)
                card = self._make(name or ours, request, expires, quota, provenance, make)
            else:
                self.stats.n_reused += 1
        self._wake()
        return card

    def keep(self, name: str, seconds: float) -> None:
        """Let a name that expires live for ``seconds`` more at least. Raises UnknownAdapter."""
        with self._lock:
            expires, least = self._store.get(name).expires, self._clock() + seconds
            if expires is not None and expires < least:
                self._store.set_expiry(name, least)

    @staticmethod
    def unnamed(request: AdapterGenerationRequest, tenant: str) -> str:
        """Return the stored name of the adapter of a request without a name."""
        return name_of(tenant, f"{GENERATED}{request.key}")

    def note(
        self, card: AdapterCard, learning: Record, *, ttl_s: float | None, busy_s: float = 0.0
    ) -> AdapterCard:
        """Write the learning record on the card and renew the expiry, as ``ensure`` does.

        Raises RevisionConflict or UnknownAdapter if the adapter was replaced or removed.
        """

        def change(current: AdapterCard) -> CardEdit:
            _check_digest(current, card.digest)
            provenance = {**current.provenance, "refinement": dict(learning)}
            return CardEdit(current.description, current.examples, current.defaults, provenance)

        with self._lock:
            self._store.edit(card.name, change)
            expires = self._expiry(card.name, ttl_s, busy_s)
            card = self._store.set_expiry(card.name, expires)
        self._wake()
        return card

    def replace(
        self,
        name: str,
        digest: str | None,
        adapter: GeneratedAdapter,
        request: AdapterGenerationRequest,
        *,
        ttl_s: float | None,
        quota: Quota,
    ) -> AdapterCard:
        """Point ``name`` at ``adapter`` and renew the expiry. Edits of the card are kept.

        ``digest`` is the content that the name must have; with None the name must be free, or a
        ``generated/…`` name of another base. Raises RevisionConflict or UnknownAdapter otherwise,
        and then changes nothing.
        """
        with self._lock:
            if digest is None:
                replaces = _is_ours(name) and self.servable(name) is None
                expires = self._expiry(name, ttl_s)
                options = PutOptions(replace=replaces, expires=expires, quota=quota)
                card = self._put_new(name, adapter, request, options)
            else:
                card = self._put_over(name, digest, adapter, ttl_s, quota)
        self._wake()
        return card

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reaper.join()

    def _wake(self) -> None:
        """Wake the task that deletes expired adapters."""
        with self._changed:
            self._changed.notify_all()

    def _expiry(self, name: str, ttl_s: float | None, busy_s: float = 0.0) -> float | None:
        """Return the time of expiry; None for a name of the caller without ``ttl_s``."""
        if ttl_s is None and not _is_ours(name):
            return None
        return self._clock() + busy_s + (ttl_s or self._ttl_s)

    def _reap(self) -> None:
        """Remove each name when it expires. Runs on the reaper's thread."""
        with self._changed:
            while not self._closed:
                try:
                    for name in self._store.expire(self._clock()):
                        _log.info("adapter %s has expired", name)
                    next_expiry = self._store.next_expiry()
                except Exception:
                    _log.exception("expired adapters could not be removed; trying again soon")
                    next_expiry = self._clock() + _RETRY_S
                wait_s = None if next_expiry is None else max(0.0, next_expiry - self._clock())
                self._changed.wait(None if wait_s is None else min(wait_s, _LONGEST_WAIT_S))

    def _make(
        self,
        name: str,
        request: AdapterGenerationRequest,
        expires: float | None,
        quota: Quota,
        provenance: Mapping[str, JsonValue],
        make: Make | None,
    ) -> AdapterCard:
        began = time.perf_counter()
        try:
            options = PutOptions(replace=_is_ours(name), expires=expires, quota=quota)
            if not options.replace:
                self._check_free(name)  # before the description may be refused
            adapter = self._generate(request, make)
            card = self._put_new(name, adapter, request, options, provenance)
        except Exception:
            self.stats.n_refused += 1
            raise
        self.stats.n_made += 1
        self.stats.seconds += time.perf_counter() - began
        return card

    def _check_free(self, name: str) -> None:
        """Raises RevisionConflict. The put checks again, in one step with the change."""
        with contextlib.suppress(UnknownAdapter):
            card = self._store.get(name)
            raise RevisionConflict(f"adapter {name!r} exists already (digest {card.digest})", card)

    def _generate(self, request: AdapterGenerationRequest, make: Make | None) -> GeneratedAdapter:
        """Raises StoreError, or ApiError if the generator itself fails."""
        try:
            adapter = make() if make else self._find_generator().generate(request)
        except (StoreError, ApiError):
            raise
        except Exception as error:
            _log.exception("the generator failed", extra={"part": "generator"})
            raise unavailable(
                "the generator of adapters failed; the server's log says "
                "why, and the next request tries again; or name an adapter instead",
                "generator_unavailable",
            ) from error
        worked("generator")
        return adapter

    def _put_new(
        self,
        name: str,
        adapter: GeneratedAdapter,
        request: AdapterGenerationRequest,
        options: PutOptions,
        provenance: Mapping[str, JsonValue] = MappingProxyType({}),
    ) -> AdapterCard:
        """Make room only here, so that a refused description evicts nothing."""
        if _is_ours(name):
            self._make_room(tenant_of(name))
        described = replace(options, description=request.description, examples=_prompts(request))
        return self._put(name, adapter, described, provenance)

    def _put_over(
        self, name: str, digest: str, adapter: GeneratedAdapter, ttl_s: float | None, quota: Quota
    ) -> AdapterCard:
        while True:
            card = self._store.get(name)
            _check_digest(card, digest)
            options = PutOptions(
                if_match=card.etag,
                description=card.description,
                examples=card.examples,
                defaults=card.defaults,
                expires=self._expiry(name, ttl_s),
                quota=quota,
            )
            try:
                return self._put(name, adapter, options)
            except RevisionConflict as conflict:
                if conflict.digest != digest:
                    raise
                # Only the card was edited: read it again.

    def servable(self, stored: str) -> AdapterCard | None:
        """Return the card of an adapter for this base, or None."""
        try:
            card = self._store.get(stored)
        except UnknownAdapter:
            return None
        return card if card.base_fingerprint == self._store.base.fingerprint else None

    def _put(
        self,
        name: str,
        adapter: GeneratedAdapter,
        options: PutOptions,
        provenance: Mapping[str, JsonValue] = MappingProxyType({}),
    ) -> AdapterCard:
        card: dict[str, JsonValue] = json.loads(json.dumps(adapter.card))
        if adapter.system_prompt is not None:
            defaults = {"system_prompt": adapter.system_prompt, **(options.defaults or {})}
            options = replace(options, defaults=defaults)
        options = replace(options, provenance={"source": "generated", **card, **provenance})
        if (digest := self._digests.get(adapter.key)) is not None:
            stored = self._store.put_stored(name, digest, options)
            if stored is not None:
                return stored
        config = json.loads(json.dumps(adapter.config))
        put = self._store.put_tensors(name, config, adapter.tensors, options=options)
        if adapter.key:
            self._digests[adapter.key] = put.digest
        return put

    def _refreshed(self, name: str, life_s: float) -> AdapterCard | None:
        """Renew the expiry of an adapter of this base. None if it is absent or expired."""
        now = self._clock()
        try:
            card = self.servable(name)
            if card is None:
                return None
            if card.expires is not None:
                if card.expires <= now:
                    return None
                if abs(now + life_s - card.expires) <= _LEAST_MOVE * life_s:
                    return card
            return self._store.set_expiry(name, now + life_s)
        except UnknownAdapter:  # deleted or expired meanwhile
            return None

    def _make_room(self, tenant: str) -> None:
        for card in self._next_evicted(tenant):
            with contextlib.suppress(UnknownAdapter):  # deleted meanwhile
                self._store.start_delete(card.name)  # running requests keep their lease

    def _next_evicted(self, tenant: str) -> list[AdapterCard]:
        """Return the adapters to delete before the tenant gets one more ``generated/…`` name.

        The first to expire go first. Adapters whose job still runs are evicted last.
        """
        ours = [
            card
            for card in self._store.list()
            if _is_ours(card.name) and tenant_of(card.name) == tenant
        ]
        ours.sort(key=lambda card: (self._learns(card), card.expires or math.inf))
        return ours[: max(0, len(ours) - self._quota + 1)]

    def _learns(self, card: AdapterCard) -> bool:
        job = record_of(card).get("job")
        return job is not None and self._runs(str(job))


def _check_digest(card: AdapterCard, digest: str) -> None:
    """Raises RevisionConflict."""
    if card.digest != digest:
        message = f"adapter {card.name!r} has digest {card.digest}, not {digest}"
        raise RevisionConflict(message, card)


def _is_ours(name: str) -> bool:
    return local_name(name).startswith(GENERATED)


def _prompts(request: AdapterGenerationRequest) -> tuple[str, ...]:
    """Return the prompts of the card, which ``auto`` compares with: wordings and inputs."""
    return (*request.wordings, *(prompt for prompt, _ in request.examples))[:_MAX_PROMPTS]
