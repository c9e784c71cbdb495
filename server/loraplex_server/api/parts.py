"""The parts from which ``build_app`` makes an application, grouped by what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.registry import Collector

from loraplex_adapter_store.plan import HeadPlan, PoolingMode, PoolingPlan
from loraplex_server.adapters.device_tier import DeviceTier
from loraplex_server.adapters.fine_tuning.training import Training
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.learning.jobs import Jobs
from loraplex_server.adapters.learning.learning import Learning
from loraplex_server.adapters.learning.store_methods import StoreMethods
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.adapters.resolving.described_adapters import DescribedAdapters
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.adapters.resolving.sentence_encoder import EncoderModel
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.engine.adapters.expert_monitor import ExpertMonitor
from loraplex_server.engine.requests.client import EngineClient
from loraplex_server.health_tracker import HealthTracker
from loraplex_server.model.encoder.image_reader import ImageReader
from loraplex_server.settings.api_keys import ApiKey
from loraplex_server.text.image_prompts import ImagePrompts

from .batches.batch_store import BatchLimits
from .middleware.rate_limit import Meter

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base model, and the sentence encoder beside it."""

    tokenizer: PreTrainedTokenizerFast
    name: str = "base"  # a model id, never a path
    vocab_size: int | None = None  # width of the logits; None: the tokenizer's size
    pooling: PoolingPlan | None = None  # of the base's embeddings; None: the normalised mean
    encoder: EncoderModel | None = None  # for vectors; None: not on this machine
    head: HeadPlan | None = None  # of a base that is a classifier itself
    writes_text: bool = True  # False: an encoder, which makes vectors and classes
    images: ImagePrompts | None = None  # of a vision-language model
    image_encoder: ImageReader | None = None

    @property
    def embedding_pooling(self) -> PoolingPlan:
        """Return the pooling of a base without one: the mean, or the first row of an image."""
        encoder = self.image_encoder
        is_mean = encoder is None or encoder.similarity is not None
        mode = PoolingMode.MEAN if is_mean else PoolingMode.CLS
        return self.pooling or PoolingPlan(mode, normalize=True)


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """The engine, with its control of adapters on the device."""

    client: EngineClient
    tier: DeviceTier | None = None  # None: the engine lets nobody pin, warm or unload adapters
    experts: ExpertMonitor | None = None  # the load of routed experts


@dataclass(frozen=True, slots=True)
class AdapterSelection:
    """Chooses adapters for requests that name none."""

    router: SemanticRouter | None = None  # for ``auto``
    descriptions: DescribedAdapters | None = None
    refused_folders: Mapping[str, str] = field(default_factory=dict)  # name → reason, live


@dataclass(frozen=True, slots=True)
class AdapterMakers:
    """The makers of adapters. A field is None if the server lacks that feature."""

    generated: GeneratedAdapters | None = None  # from a description
    learning: Learning | None = None  # from examples
    training: Training | None = None  # from chats
    training_thread: TrainingThread | None = None  # computes for all that learn
    store_methods: StoreMethods | None = None  # from the adapters of the store


@dataclass(frozen=True, slots=True)
class Workers:
    """Threads for blocking calls, and the jobs that run on them."""

    pools: WorkerPools
    jobs: Jobs

    @classmethod
    def start(cls) -> Workers:
        pools = WorkerPools()
        return cls(pools, Jobs(pools.jobs))


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The receivers of failures, metrics and traces."""

    health_tracker: HealthTracker = field(default_factory=HealthTracker)
    collectors: Sequence[Collector] = ()  # further ones for /metrics
    tracing: TracerProvider | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of API keys and of batches."""

    meter_of: Callable[[ApiKey], Meter] = Meter
    batches: BatchLimits = field(default_factory=BatchLimits)
