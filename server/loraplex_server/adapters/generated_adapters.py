"""Generates adapters from descriptions, registers them, and lets them expire.

order ──► key ──► known and alive? ──► its name        (refreshed)
                  else generate ──► store ──► its name (oldest generated ones make room)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import UnknownAdapter
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.service import GeneratedAdapter, Generator

__all__ = ["PREFIX", "AdapterGenerationRequest", "GeneratedAdapters", "GenerationStats"]

PREFIX = "generated/"  # of the names that we choose


@dataclass(frozen=True, slots=True)
class AdapterGenerationRequest:
    """What is asked for. Equal orders give the same adapter, and are made once."""

    description: str
    examples: tuple[str, ...] = ()  # further wordings of the same wish
    prompts: tuple[str, ...] = ()  # unlabelled inputs of the task
    method: str = "auto"
    seed: int = 0
    samples: int = 0  # draws from the generator's latent that are averaged; 0 decodes its centre
    force: bool = False  # also if the description is out of distribution

    @property
    def key(self) -> str:
        parts = [
            self.description,
            self.examples,
            self.prompts,
            self.method,
            self.seed,
            self.samples,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(slots=True)
class GenerationStats:
    """What has become of the orders; ``seconds`` of those that were made."""

    n_made: int = 0
    n_reused: int = 0
    n_refused: int = 0
    seconds: float = 0.0  # generating, checking and registering


class GeneratedAdapters:
    """Owner of the generated names. Thread-safe; calls take tens of milliseconds and may block."""

    def __init__(
        self,
        store: AdapterStore,
        load: Callable[[], Generator],
        *,
        ttl_s: float = 3600.0,
        quota: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` is called once, for the first order. `quota` bounds the names that we choose.

        Names of an earlier life of the server are adopted and expire like new ones.
        """
        self._store, self._load = store, load
        self._ttl_s, self._quota, self._clock = ttl_s, quota, clock
        self._generator: Generator | None = None
        self.stats = GenerationStats()  # written under the lock, read by /metrics
        self._lock = threading.Lock()  # one flight at a time: the second of a kind finds the first
        old = [card.name for card in store.list() if card.name.startswith(PREFIX)]
        self._expires: dict[str, float] = dict.fromkeys(old, clock() + ttl_s)  # oldest use first

    def ensure(
        self,
        order: AdapterGenerationRequest,
        *,
        name: str | None = None,
        ttl_s: float | None = None,
    ) -> AdapterCard:
        """The adapter of an order, made now or still there; its life starts anew.

        A `name` of the caller's lives until it is deleted, unless `ttl_s` is given; it must be
        free. Raises OutOfDistribution, NotTrained, GeneratorMismatch, UnfitPrompts,
        RevisionConflict and what the store raises.
        """
        with self._lock:
            self._expire()
            chosen = name or f"{PREFIX}{order.key}"
            known = None if name else self._alive(chosen)
            if known is None:
                if name is None:
                    self._make_room()
                known = self._make(chosen, order)
            else:
                self.stats.n_reused += 1
            if name is None or ttl_s is not None:
                self._expires.pop(chosen, None)
                self._expires[chosen] = self._clock() + (ttl_s or self._ttl_s)
            return known

    def _make(self, name: str, order: AdapterGenerationRequest) -> AdapterCard:
        began = time.perf_counter()
        try:
            card = self._register(name, self._generate(order), order)
        except Exception:
            self.stats.n_refused += 1
            raise
        self.stats.n_made += 1
        self.stats.seconds += time.perf_counter() - began
        return card

    def _generate(self, order: AdapterGenerationRequest) -> GeneratedAdapter:
        if self._generator is None:
            self._generator = self._load()
        return self._generator.generate(
            order.description,
            examples=order.examples,
            prompts=order.prompts,
            method=order.method,
            seed=order.seed,
            samples=order.samples,
            force=order.force,
        )

    def _register(
        self, name: str, made: GeneratedAdapter, order: AdapterGenerationRequest
    ) -> AdapterCard:
        card: dict[str, JsonValue] = json.loads(json.dumps(made.card))
        return self._store.put_tensors(
            name,
            json.loads(json.dumps(made.config)),
            made.tensors,
            replace=name.startswith(PREFIX),
            description=order.description,
            examples=order.examples,
            provenance={"source": "generated", **card},
        )

    def _alive(self, name: str) -> AdapterCard | None:
        try:
            return self._store.get(name) if name in self._expires else None
        except UnknownAdapter:  # deleted by a client
            del self._expires[name]
            return None

    def _expire(self) -> None:
        now = self._clock()
        for name in [name for name, at in self._expires.items() if at <= now]:
            self._drop(name)

    def _make_room(self) -> None:
        ours = [name for name in self._expires if name.startswith(PREFIX)]
        for name in ours[: max(0, len(ours) - self._quota + 1)]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        del self._expires[name]
        with contextlib.suppress(UnknownAdapter):  # a client was faster
            self._store.delete(name, timeout_s=0.0)  # running requests keep their lease
