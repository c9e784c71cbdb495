"""What a gateway sends to an engine replica: a request without what only its process has.

A lease becomes the recipe of its plan, a compiled grammar the text it was compiled of. Events come
back as they are. Everything here is frozen and may cross processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraplex_adapter_store.lease import AdapterLease, AdapterRecipe
from loraplex_adapter_store.selector import Library, Mixture, MixturePart, NameRef
from loraplex_router.experts import ExpertLoad
from loraplex_server.engine.client import AdapterRef, EngineStats, GenerationRequest, TenantShare
from loraplex_server.engine.grammar import CompiledGrammar, GrammarSpec
from loraplex_server.engine.pooling import Pooling
from loraplex_server.engine.sampling_params import SamplingParams
from loraplex_server.faults import Degradation

__all__ = ["RemoteAdapter", "RemoteRequest", "ReplicaStats"]


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    replica: str  # Ray's name of it
    engine: EngineStats
    alive: bool = True  # its engine runs and moves
    host_adapters: tuple[str, ...] = ()  # digests with a plan in host memory, some hundreds at most
    host_bytes_used: int = 0
    host_bytes_total: int = 0
    expert_loads: Mapping[str, ExpertLoad] = field(default_factory=dict)  # digest → last minute
    adapter_requests: Mapping[str, int] = field(default_factory=dict)  # digest → taken since start
    faults: Mapping[str, int] = field(default_factory=dict)  # part → failures since start
    degraded: tuple[Degradation, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoteAdapter:
    """A leased adapter, by digests: what its names mean is not asked again."""

    digest: str
    name: str  # that had the digest; of a mixture or library the label
    combined: Mixture | Library | None  # with the digest of each part
    tenant: str  # whose memory a combined one takes

    @property
    def names(self) -> Sequence[str]:
        match self.combined:
            case Mixture(parts):
                return [part.ref.name for part in parts]
            case Library(refs=refs):
                return [ref.name for ref in refs]
        return (self.name,)

    @staticmethod
    def of(adapter: AdapterRef) -> RemoteAdapter:
        assert isinstance(adapter, AdapterLease)
        recipe = adapter.recipe
        return RemoteAdapter(adapter.digest, adapter.name, _with_digests(recipe), recipe.tenant)


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    """See ``GenerationRequest``."""

    base: str  # fingerprint of the one whose tokens these are
    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: RemoteAdapter | None
    cache_salt: str
    grammar: GrammarSpec | None
    share: TenantShare
    pooling: Pooling | None

    @staticmethod
    def of(request: GenerationRequest, base: str) -> RemoteRequest:
        return RemoteRequest(
            base=base,
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            adapter=None if request.adapter is None else RemoteAdapter.of(request.adapter),
            cache_salt=request.cache_salt,
            grammar=None if request.grammar is None else request.grammar.spec,
            share=request.share,
            pooling=request.pooling,
        )

    def local(
        self, request_id: str, adapter: AdapterRef | None, grammar: CompiledGrammar | None
    ) -> GenerationRequest:
        """For the engine of this process, under an id of its own."""
        return GenerationRequest(
            request_id=request_id,
            prompt_ids=self.prompt_ids,
            sampling=self.sampling,
            adapter=adapter,
            cache_salt=self.cache_salt,
            grammar=grammar,
            share=self.share,
            pooling=self.pooling,
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
