"""The engine as the HTTP front sees it: requests are submitted, events come to a listener."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from loraplex_adapter_store.plan import AdapterPlan

from .events import TokenEvent
from .grammar import CompiledGrammar
from .pooling import Pooling
from .sampling_params import SamplingParams

__all__ = [
    "STEP_TOKENS",
    "AdapterRef",
    "EngineClient",
    "EngineStats",
    "GenerationRequest",
    "Listener",
    "TenantShare",
    "TenantStats",
]

Listener = Callable[[TokenEvent], None]

# upper bounds of the groups in ``EngineStats.steps_by_tokens``; the last group has none
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))


class AdapterRef(Protocol):
    """What the engine needs of a leased adapter: identity and plan (see the store's lease)."""

    @property
    def digest(self) -> str: ...

    @property
    def plan(self) -> AdapterPlan: ...


@dataclass(frozen=True, slots=True)
class TenantShare:
    """Whose request it is, and how much of the engine it may take. Without keys: the default."""

    tenant: str = ""
    weight: float = 1.0  # twice the weight, twice the tokens where tenants compete
    max_running: int | None = None  # rows of the batch; None: no limit
    max_queued: int | None = None  # waiting requests; None: ``max_queue`` of the engine


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One choice to generate, or one prompt to read vectors from.

    ``n`` choices are ``n`` requests that share their prefix.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None  # None = the base model
    cache_salt: str = ""  # tenant's salt of the prefix cache
    grammar: CompiledGrammar | None = None  # that the answer follows, and ends with
    share: TenantShare = TenantShare()
    pooling: Pooling | None = None  # ends after the prompt, with vectors and no token

    @property
    def reads_all_rows(self) -> bool:
        """Whether the prefix cache is of no use: every token of the prompt is looked at."""
        if self.pooling is not None:
            return self.pooling.reads_all_rows
        return self.sampling.prompt_logprobs is not None


class TenantStats(NamedTuple):
    tenant: str
    n_running: int
    n_waiting: int
    n_admitted: int  # requests that got their first row
    n_steps_queued: int  # that they waited for it, together


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics and /health; cheap and consistent."""

    n_running: int = 0
    n_waiting: int = 0
    max_batch_size: int = 0  # requests that one step can compute
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    n_steps: int = 0
    n_step_tokens: int = 0  # computed by all steps, of prompts and answers
    steps_by_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS) + 1)  # steps of so many tokens
    n_preemptions: int = 0
    n_rows_taken_back: int = 0  # preemptions for the sake of another tenant
    tenants: tuple[TenantStats, ...] = ()  # empty while there is one
    n_forced_tokens: int = 0  # of answers, that grammars left no choice about
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    pool_bytes_used: int = 0
    pool_bytes_total: int = 0
    pool_slots_used: int = 0  # one an adapter, and one for each of its experts
    pool_slots_total: int = 0
    n_adapter_loads: int = 0
    n_adapter_evictions: int = 0
    adapter_load_seconds: float = 0.0  # of all loads to the device together
    running_adapters: Mapping[str, int] = field(default_factory=dict)  # digest → running requests
    waiting_adapters: Mapping[str, int] = field(default_factory=dict)
    resident_adapters: tuple[str, ...] = ()  # digests with a place on the device
    resident_bytes: Mapping[str, int] = field(default_factory=dict)  # that each takes there
    resident_load_s: Mapping[str, float] = field(default_factory=dict)  # of the load to there
    step_age_s: float = 0.0  # since the engine thread last showed life


class EngineClient(Protocol):
    """Thread-safe. Implemented by ``Engine`` and by the tests' ``FakeEngine``."""

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Queues the request; ``listener`` runs on the event loop that submitted it, in order.

        Must be called on a running event loop. Raises QueueFull, EngineDraining, ContextOverflow
        or EngineDead, and then never calls the listener. Otherwise exactly one last event comes.
        """

    def cancel(self, request_id: str) -> None:
        """Frees the request within one step; its last event is CANCELLED. Unknown ids are fine."""

    def stats(self) -> EngineStats: ...

    def n_queued(self, tenant: str) -> int:
        """Requests of a tenant that wait for their first row; what ``submit`` limits."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests, waits for the running ones; False if some were cut off."""
