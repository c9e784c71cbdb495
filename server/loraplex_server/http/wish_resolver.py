"""``adapter: "auto"`` and descriptions: the router and the generator behind the front's hook."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor

from loraplex_adapter_store.generator.sentences import SentenceEncoder
from loraplex_adapter_store.selector import Auto, Description, NameRef
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.adapters import AdapterProfile, AutoRouter

from .adapter_choice import Resolution
from .errors import invalid

__all__ = ["AdapterGenerator", "WishResolver"]


class AdapterGenerator(Protocol):
    """Makes an adapter from a sentence and registers it. Called on a worker thread."""

    def generate(self, description: Description) -> Resolution:
        """Raises StoreError or ApiError."""


class WishResolver:
    """One thread owns the encoder and the router; both are made when they are first needed."""

    def __init__(
        self,
        store: AdapterStore,
        find_encoder: Callable[[], Path],
        generator: AdapterGenerator | None = None,
    ) -> None:
        """``find_encoder`` returns the sentence encoder's directory, or raises with a remedy."""
        self._store = store
        self._find_encoder = find_encoder
        self._generator = generator
        self._router: AutoRouter | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-wishes")

    async def resolve(self, wish: Auto | Description, text: str) -> Resolution:
        loop = asyncio.get_running_loop()
        if isinstance(wish, Auto):
            return await loop.run_in_executor(self._thread, self._choose, text)
        if self._generator is None:
            raise invalid(
                "adapter generation is not enabled on this server; name an adapter instead",
                "adapter",
                "feature_not_enabled",
            )
        return await loop.run_in_executor(self._thread, self._generator.generate, wish)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _choose(self, text: str) -> Resolution:
        if self._router is None:
            self._router = AutoRouter(_UnitSentences(self._find_encoder()))
        self._router.update(
            [
                AdapterProfile(card.name, card.description, card.examples)
                for card in self._store.list()
            ]
        )
        decision = self._router.route([text])[0]
        chosen = None if decision.adapter is None else NameRef(decision.adapter)
        return Resolution(chosen, {"method": "auto", **decision.to_json()})


class _UnitSentences:
    """The sentence encoder in the shape the router asks for."""

    def __init__(self, directory: Path) -> None:
        self._encoder = SentenceEncoder(directory)

    @property
    def dim(self) -> int:
        return self._encoder.width

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.encode(texts).sentence
