"""Generates adapters from descriptions, registers them, and lets them expire.

request ──► key ──► known? ──► its name               (its life starts anew)
                    else generate ──► store ──► name  (the first to expire makes room)

When a name expires is kept in the store, so a restart changes nothing; a thread removes it then.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from loraplex_adapter_store.card import AdapterCard, CardEdit
from loraplex_adapter_store.errors import RevisionConflict, StoreError, UnknownAdapter
from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_adapter_store.names import local_name, name_of, tenant_of
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.quota import NO_QUOTA, Quota
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.service import GeneratedAdapter, Generator
from loraplex_server.api.errors import ApiError, unavailable
from loraplex_server.api_keys import GENERATED

from .learning_record import Record, is_learning, record_of

__all__ = ["AdapterGenerationRequest", "GeneratedAdapters", "GenerationStats"]

_LONGEST_WAIT_S = 60.0  # the clock may be set meanwhile
_RETRY_S = 5.0
_MAX_PROMPTS = 100  # on a card
# A use that moves the expiry by less than this share of the adapter's life writes nothing: with a
# catalogue each write is an object that stays, and a description may be sent many times a second.
_LEAST_MOVE = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterGenerationRequest:
    """What is asked for. Equal requests give the same adapter, and are made once."""

    description: str
    wordings: tuple[str, ...] = ()  # further ones of the same task
    prompts: tuple[str, ...] = ()  # unlabelled inputs of the task
    method: str = "auto"
    seed: int = 0
    samples: int = 0  # draws from the generator's latent that are averaged; 0 decodes its centre
    examples: tuple[tuple[str, str], ...] = ()  # prompt and answer
    force: bool = False  # also if the description is out of distribution

    @property
    def key(self) -> str:
        """Some milliseconds for long examples, the first time."""
        return _key_of(self)


@functools.lru_cache(maxsize=8)  # each of up to two megabytes
def _key_of(request: AdapterGenerationRequest) -> str:
    parts = [
        request.description,
        request.wordings,
        request.prompts,
        request.method,
        request.seed,
        request.samples,
        request.force,
        *([request.examples] if request.examples else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(slots=True)
class GenerationStats:
    """What has become of the requests; ``seconds`` of those that were made."""

    n_made: int = 0
    n_reused: int = 0
    n_refused: int = 0
    seconds: float = 0.0  # generating, checking and registering


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
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
        runs: Callable[[str], bool] = lambda job: True,
    ) -> None:
        """``find_generator`` is called for each adapter that is made; it loads once and keeps it.

        ``quota`` bounds the names that we choose for a tenant. ``clock``: seconds since the epoch.
        ``runs``: whether the job of this id that a card names runs still, any thread; by default
        nobody knows.
        """
        self._store, self._find_generator = store, find_generator
        self._ttl_s, self._quota, self._clock = ttl_s, quota, clock
        self._faults, self._runs = faults, runs
        self.stats = GenerationStats()  # written under the lock, read by /metrics
        self._lock = threading.Lock()  # one flight at a time: the second of a kind finds the first
        self._changed = threading.Condition()  # another name expires first, or this is closed
        self._closed = False
        for card in store.seen():  # of a version that did not keep expiries
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
        told: Mapping[str, JsonValue] = MappingProxyType({}),
        busy_s: float = 0.0,
    ) -> AdapterCard:
        """The adapter of a request, made now or still there; its life starts anew.

        Of a request with examples, the draft or what was learnt. ``told``: what the card of one
        that is made now says besides. ``busy_s``: how long a job may take that it lives to the end
        of, and `ttl_s` longer.

        It belongs to `tenant`, who has `quota` and as many names that we choose as every other. A
        `name` of the caller's, as the store knows it, lives until it is deleted, unless `ttl_s` is
        given; it must be free. Raises OutOfDistribution, NotTrained, GeneratorMismatch,
        UnfitPrompts, RevisionConflict and what the store raises.
        """
        with self._lock:
            ours = self.unnamed(request, tenant)
            expires = self._expiry(name or ours, ttl_s, busy_s)
            card = None if name else self._refreshed(ours, busy_s + (ttl_s or self._ttl_s))
            if card is None:
                if name or not self._in_the_way(tenant):  # else it takes another's place
                    self._store.check_quota(name or ours, quota)
                card = self._make(name or ours, request, expires, quota, told)
            else:
                self.stats.n_reused += 1
        self._wake()
        return card

    def renewed(self, card: AdapterCard, ttl_s: float | None) -> AdapterCard | None:
        """As ``ensure``, for one without a name that is to be there still; None: it is gone."""
        with self._lock:
            again = self._refreshed(card.name, ttl_s or self._ttl_s)
            self.stats.n_reused += again is not None
        self._wake()
        return again

    @staticmethod
    def unnamed(request: AdapterGenerationRequest, tenant: str) -> str:
        """What the store calls the adapter of a request that gives no name."""
        return name_of(tenant, f"{GENERATED}{request.key}")

    def note(
        self, card: AdapterCard, learning: Record, *, ttl_s: float | None, busy_s: float = 0.0
    ) -> AdapterCard:
        """Writes on the card what has become of learning; its life starts anew, as in ``ensure``.

        Raises RevisionConflict or UnknownAdapter if somebody replaced or removed the adapter.
        """

        def change(now: AdapterCard) -> CardEdit:
            _check_same(now, card.digest)
            provenance = {**now.provenance, "refinement": dict(learning)}
            return CardEdit(now.description, now.examples, now.defaults, provenance)

        with self._lock:
            self._store.edit(card.name, change)
            expires = self._expiry(card.name, ttl_s, busy_s)
            noted = self._store.set_expiry(card.name, expires)
        self._wake()
        return noted

    def replace_draft(
        self,
        name: str,
        draft: str | None,
        made: GeneratedAdapter,
        request: AdapterGenerationRequest,
        *,
        ttl_s: float | None,
        quota: Quota,
    ) -> AdapterCard:
        """Points ``name`` at what was learnt; what people wrote on the card meanwhile stays.

        Its life starts anew, as in ``ensure``.

        ``draft``: the digest that the name must have still; None: the name must be free, or one
        that we chose, for another base. Raises RevisionConflict or UnknownAdapter if somebody
        replaced or removed it, and changes nothing.
        """
        with self._lock:  # nobody starts its life anew meanwhile
            if draft is None:
                card = self._put_new(name, made, request, ttl_s, quota)
            else:
                card = self._put_over(name, draft, made, ttl_s, quota)
        self._wake()
        return card

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reaper.join()

    def _wake(self) -> None:
        """Another name may be the first to expire."""
        with self._changed:
            self._changed.notify_all()

    def _expiry(self, name: str, ttl_s: float | None, busy_s: float = 0.0) -> float | None:
        """Of a life that starts now. A name of the caller's lasts unless ``ttl_s`` is given."""
        if ttl_s is None and not _is_ours(name):
            return None
        return self._clock() + busy_s + (ttl_s or self._ttl_s)

    def _reap(self) -> None:
        """Removes each name when it expires."""
        with self._changed:
            while not self._closed:
                try:
                    for name in self._store.expire(self._clock()):
                        _log.info("adapter %s has expired", name)
                    next_expiry = self._store.next_expiry()
                except Exception:
                    _log.exception("expired adapters could not be removed; tried again soon")
                    next_expiry = self._clock() + _RETRY_S
                wait_s = None if next_expiry is None else max(0.0, next_expiry - self._clock())
                self._changed.wait(None if wait_s is None else min(wait_s, _LONGEST_WAIT_S))

    def _make(
        self,
        name: str,
        request: AdapterGenerationRequest,
        expires: float | None,
        quota: Quota,
        told: Mapping[str, JsonValue],
    ) -> AdapterCard:
        began = time.perf_counter()
        try:
            options = PutOptions(
                replace=_is_ours(name),
                description=request.description,
                examples=_prompts(request),
                expires=expires,
                quota=quota,
            )
            if not options.replace:
                self._check_free(name)  # a description that is refused never gets to the put
            made = self._generate(request)
            if _is_ours(name):  # only now: what is refused costs no other its name
                self._make_room(tenant_of(name))
            card = self._put(name, made, options, told)
        except Exception:
            self.stats.n_refused += 1
            raise
        self.stats.n_made += 1
        self.stats.seconds += time.perf_counter() - began
        return card

    def _check_free(self, name: str) -> None:
        """Raises RevisionConflict. A put asks again, in one step with the change."""
        with contextlib.suppress(UnknownAdapter):
            card = self._store.get(name)
            raise RevisionConflict(f"adapter {name!r} exists already (digest {card.digest})", card)

    def _generate(self, request: AdapterGenerationRequest) -> GeneratedAdapter:
        """Raises StoreError, or ApiError if the generator itself fails."""
        try:
            made = self._find_generator().generate(
                request.description,
                wordings=request.wordings,
                prompts=request.prompts,
                method=request.method,
                seed=request.seed,
                samples=request.samples,
                force=request.force,
            )
        except (StoreError, ApiError):
            raise
        except Exception as error:
            _log.exception("the generator failed")
            self._faults.failed("generator", error)
            raise unavailable(
                "the generator of adapters failed; the server's log says "
                "why, and the next request tries again; or name an adapter instead",
                "generator_unavailable",
            ) from error
        self._faults.worked("generator")
        return made

    def _put_new(
        self,
        name: str,
        made: GeneratedAdapter,
        request: AdapterGenerationRequest,
        ttl_s: float | None,
        quota: Quota,
    ) -> AdapterCard:
        if _is_ours(name):
            self._make_room(tenant_of(name))
        options = PutOptions(
            replace=_is_ours(name) and self.servable(name) is None,
            description=request.description,
            examples=_prompts(request),
            expires=self._expiry(name, ttl_s),
            quota=quota,
        )
        return self._put(name, made, options)

    def _put_over(
        self, name: str, draft: str, made: GeneratedAdapter, ttl_s: float | None, quota: Quota
    ) -> AdapterCard:
        while True:
            card = self._store.get(name)
            _check_same(card, draft)
            options = PutOptions(
                if_match=card.etag,
                description=card.description,
                examples=card.examples,
                defaults=card.defaults,
                expires=self._expiry(name, ttl_s),
                quota=quota,
            )
            try:
                return self._put(name, made, options)
            except RevisionConflict as conflict:
                if conflict.digest != draft:
                    raise  # else: its card was edited since

    def servable(self, stored: str) -> AdapterCard | None:
        """None, too, for one that was made for another base."""
        try:
            card = self._store.get(stored)
        except UnknownAdapter:
            return None
        return card if card.base_fingerprint == self._store.base.fingerprint else None

    def _put(
        self,
        name: str,
        made: GeneratedAdapter,
        options: PutOptions,
        told: Mapping[str, JsonValue] = MappingProxyType({}),
    ) -> AdapterCard:
        card: dict[str, JsonValue] = json.loads(json.dumps(made.card))
        provenance = {"source": "generated", **card, **told}
        return self._store.put_tensors(
            name,
            json.loads(json.dumps(made.config)),
            made.tensors,
            options=replace(options, provenance=provenance),
        )

    def _refreshed(self, name: str, life_s: float) -> AdapterCard | None:
        """None if there is no such adapter for this base, or it has expired."""
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
        except UnknownAdapter:  # deleted by a client, or expired
            return None

    def _make_room(self, tenant: str) -> None:
        for card in self._in_the_way(tenant):
            with contextlib.suppress(UnknownAdapter):  # a client was faster
                self._store.start_delete(card.name)  # running requests keep their lease

    def _in_the_way(self, tenant: str) -> list[AdapterCard]:
        """The first to expire, that one more name may be chosen."""
        ours = [
            card
            for card in self._store.list()
            if _is_ours(card.name) and tenant_of(card.name) == tenant
        ]
        # One that a job makes better goes last, and there are fewer of them than may be.
        ours.sort(key=lambda card: (self._learns(card), card.expires or math.inf))
        return ours[: max(0, len(ours) - self._quota + 1)]

    def _learns(self, card: AdapterCard) -> bool:
        record = record_of(card)
        return is_learning(record) and self._runs(str(record["job"]))


def _check_same(card: AdapterCard, digest: str) -> None:
    """Raises RevisionConflict."""
    if card.digest != digest:
        told = f"adapter {card.name!r} has digest {card.digest}, not {digest}"
        raise RevisionConflict(told, card)


def _is_ours(name: str) -> bool:
    return local_name(name).startswith(GENERATED)


def _prompts(request: AdapterGenerationRequest) -> tuple[str, ...]:
    """What the card shows, and ``auto`` compares with: other wordings, and inputs of the task."""
    return (*request.wordings, *(prompt for prompt, _ in request.examples))[:_MAX_PROMPTS]
