"""``adapter: "auto"`` and descriptions: the router and the generator behind the front's hook."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from loraplex_adapter_store.selector import Auto, Description, NameRef
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.adapters import AdapterProfile, Encoder
from loraplex_server.api.errors import invalid
from loraplex_server.api_keys import AdapterAccess

from .generated_adapters import PREFIX
from .resolver import Resolution
from .semantic_router import SemanticRouter

__all__ = ["AdapterGenerator", "DescriptionResolver"]


class AdapterGenerator(Protocol):
    """Makes an adapter from a sentence and registers it. Called on a worker thread."""

    def generate(self, description: Description) -> Resolution:
        """Raises StoreError or ApiError."""


class DescriptionResolver:
    """``auto`` is answered by ``router``, on its thread; descriptions on another one."""

    def __init__(
        self, store: AdapterStore, encoder: Encoder, generator: AdapterGenerator | None = None
    ) -> None:
        self._store = store
        self._generator = generator
        self.router = SemanticRouter(encoder, self._profiles)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-descriptions")

    async def resolve(
        self, wish: Auto | Description, text: str, access: AdapterAccess
    ) -> Resolution:
        if isinstance(wish, Auto):
            decision = await self.router.choose(text, access)
            chosen = None if decision.adapter is None else NameRef(decision.adapter)
            return Resolution(chosen, {"method": "auto", **decision.to_json()})
        if self._generator is None:
            raise invalid(
                "adapter generation is not enabled on this server; name an adapter instead",
                "adapter",
                "feature_not_enabled",
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._generator.generate, wish)

    def close(self) -> None:
        self.router.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _profiles(self) -> list[AdapterProfile]:
        """Unnamed generated adapters are for the request that described them, for no other."""
        return [
            AdapterProfile(card.name, card.description, card.examples)
            for card in self._store.list()
            if not card.name.startswith(PREFIX)
        ]
