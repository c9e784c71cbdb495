"""The request that a gateway sends to an engine replica, and the events that come back.

A lease becomes the digests of its plan, a compiled grammar becomes its text. All values are frozen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraplex_adapter_store.leasing import AdapterLease, AdapterRecipe
from loraplex_adapter_store.names.selector import Library, Mixture, MixturePart, NameRef
from loraplex_router.experts.load import ExpertLoad
from loraplex_server.engine.requests.client import (
    EngineStats,
    GenerationRequest,
)
from loraplex_server.engine.requests.events import TokenEvent
from loraplex_server.engine.requests.grammar import GrammarSpec
from loraplex_server.health_tracker import Degradation


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    replica: str  # Ray's name
    engine: EngineStats
    alive: bool = True  # the engine runs and steps
    host_adapters: tuple[str, ...] = ()  # digests in host memory, some hundreds at most
    host_bytes_used: int = 0
    host_bytes_total: int = 0
    expert_loads: Mapping[str, ExpertLoad] = field(default_factory=dict)  # digest → last minute
    adapter_requests: Mapping[str, int] = field(default_factory=dict)  # digest → since the start
    faults: Mapping[str, int] = field(default_factory=dict)  # part → failures since start
    degraded: tuple[Degradation, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoteAdapter:
    """A leased adapter, by digests. Names are not resolved again."""

    digest: str
    name: str  # that was resolved to the digest; the label of a mixture or library
    combined: Mixture | Library | None  # with the digest of each part
    tenant: str  # whose share of host memory a mixture or library takes

    @property
    def names(self) -> Sequence[str]:
        match self.combined:
            case Mixture(parts):
                return [part.ref.name for part in parts]
            case Library(refs=refs):
                return [ref.name for ref in refs]
        return (self.name,)

    @staticmethod
    def of(adapter: AdapterLease) -> RemoteAdapter:
        assert isinstance(adapter, AdapterLease)
        recipe = adapter.recipe
        return RemoteAdapter(adapter.digest, adapter.name, _with_digests(recipe), recipe.tenant)


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    base: str  # fingerprint of the base of these tokens
    request: GenerationRequest  # without its adapter and grammar
    adapter: RemoteAdapter | None
    grammar: GrammarSpec | None

    @staticmethod
    def of(request: GenerationRequest, base: str) -> RemoteRequest:
        return RemoteRequest(
            base,
            replace(request, adapter=None, grammar=None),
            adapter=None if request.adapter is None else RemoteAdapter.of(request.adapter),
            grammar=None if request.grammar is None else request.grammar.spec,
        )


def _with_digests(recipe: AdapterRecipe) -> Mixture | Library | None:
    digests = [content.digest for content in recipe.contents]
    match recipe.selector:
        case None:
            return None
        case Mixture(parts):
            pairs = zip(parts, digests, strict=True)
            return Mixture(tuple(MixturePart(NameRef(p.ref.name, d), p.weight) for p, d in pairs))
        case Library(refs=refs) as library:
            named = zip(refs, digests, strict=True)
            return replace(library, refs=tuple(NameRef(ref.name, d) for ref, d in named))


class EventBuffer:
    """Buffers the events of a request, on the event loop.

    ``put`` is a listener of the engine. Iterate ``lists`` once.
    """

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()
        if event.finish is not None:
            self._ended.set()

    async def lists(self, gap_s: float) -> AsyncIterator[list[TokenEvent]]:
        """Yield the first events at once, then at most one list every ``gap_s`` seconds.

        Each list costs a trip between processes, whatever its length. The list with the last event
        comes without delay.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            events, self._events = self._events, []
            yield events
            if events[-1].finish is not None:
                return
            try:
                await asyncio.wait_for(self._ended.wait(), gap_s)
            except TimeoutError:
                continue
