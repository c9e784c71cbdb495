"""The engine's interface for the HTTP side: requests go in, events come to a listener."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_server.model.encoder.encoder import Modality
from loraplex_server.model.vision.prompt_image import PromptImage

from .events import TokenEvent
from .grammar import CompiledGrammar
from .pooling import Pooling
from .sampling_params import SamplingParams

Listener = Callable[[TokenEvent], None]

# Upper bounds of the groups in ``EngineStats.steps_by_tokens``; the last group has none.
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))


@dataclass(frozen=True, slots=True)
class TenantShare:
    """The tenant of a request and its share of the engine. Servers without keys use the default."""

    tenant: str = ""
    weight: float = 1.0  # tenants that compete get tokens in proportion to their weights
    max_running: int | None = None  # rows of the batch; None: no limit
    max_queued: int | None = None  # waiting requests; None: ``max_queue`` of the engine


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A choice to generate, or a prompt to compute vectors of.

    ``n`` choices are ``n`` requests that share their prefix.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterLease | None = None  # None = the base model
    cache_salt: str = ""  # tenant's salt of the prefix cache
    grammar: CompiledGrammar | None = None  # the answer follows it and ends with it
    share: TenantShare = TenantShare()
    pooling: Pooling | None = None  # the request ends after its prompt, with vectors
    second_text_at: int | None = None  # token at which the second text of an encoder's pair begins
    images: tuple[PromptImage, ...] = ()
    drafts: bool = True  # next tokens may be guessed and verified together; changes no answer
    prediction_ids: tuple[int, ...] = ()  # a text that the answer probably repeats, for drafts
    # An encoder's image [channels, height, width], in place of the prompt's tokens: one id a row.
    pixels: Tensor | None = None

    @property
    def modality(self) -> Modality:
        """Return which tower of an encoder reads the request."""
        return Modality.TEXT if self.pixels is None else Modality.IMAGE

    @property
    def reads_all_rows(self) -> bool:
        """Return True if every token of the prompt must be computed, prefix cache or not."""
        if self.pooling is not None:
            return self.pooling.reads_all_rows
        return self.sampling.prompt_logprobs is not None


class TenantStats(NamedTuple):
    tenant: str
    n_running: int
    n_waiting: int
    n_admitted: int  # requests that got their first row
    n_steps_queued: int  # steps that these requests waited for it, in total


class LostAtStart(NamedTuple):
    """Steps of one kind lack this, since a kernel failed while the engine started."""

    what: str  # "kernels": they compile at their first use; "graphs": steps run without
    layers: str  # base, lora or routed_mlp
    problem: str  # the function that failed, and the kind of its error


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics and /health; cheap and consistent."""

    n_running: int = 0
    n_waiting: int = 0
    max_batch_size: int = 0  # requests that one step can compute
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    n_steps: int = 0
    n_step_tokens: int = 0  # tokens of all steps, prompts and answers
    steps_by_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS) + 1)  # see STEP_TOKENS
    n_preemptions: int = 0
    n_fairness_preemptions: int = 0  # preemptions in favour of another tenant
    tenants: tuple[TenantStats, ...] = ()  # empty with a single tenant
    n_jump_forward_tokens: int = 0  # tokens of answers that grammars forced
    n_drafts: int = 0  # chunks with guesses of next tokens
    n_drafted_tokens: int = 0  # guesses of next tokens that steps verified
    n_accepted_tokens: int = 0  # guesses that became tokens of answers
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    prefix_restored: int = 0  # tokens that came back from files
    pool_bytes_used: int = 0
    pool_bytes_total: int = 0
    pool_slots_used: int = 0  # an adapter takes one, and one for each of its experts
    pool_slots_total: int = 0
    n_adapter_loads: int = 0
    n_adapter_evictions: int = 0
    adapter_load_seconds: float = 0.0  # sum over all loads to the device
    running_adapters: Mapping[str, int] = field(default_factory=dict)  # digest → running requests
    waiting_adapters: Mapping[str, int] = field(default_factory=dict)
    resident_adapters: tuple[str, ...] = ()  # digests
    resident_bytes: Mapping[str, int] = field(default_factory=dict)  # by digest
    resident_load_s: Mapping[str, float] = field(default_factory=dict)  # of the load, by digest
    lost_at_start: tuple[LostAtStart, ...] = ()
    step_age_s: float = 0.0  # since the last sign of life of the engine thread


class EngineClient(Protocol):
    """The interface of ``Engine`` and of the tests' ``FakeEngine``. Thread-safe."""

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Queues the request. ``listener`` gets its events in order, on the calling event loop.

        Must be called on a running event loop. Raises QueueFull, EngineDraining, ContextOverflow
        or EngineDead, and then never calls the listener. Otherwise exactly one last event comes.
        """

    def cancel(self, request_id: str) -> None:
        """Ends the request within one step, with a CANCELLED event. Ignores unknown ids."""

    def stats(self) -> EngineStats: ...

    def n_queued(self, tenant: str) -> int:
        """Return how many requests of a tenant wait for their first row. ``submit`` limits them."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the others. Return False if some were cut off."""
