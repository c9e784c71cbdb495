"""The front of a server: the application around an engine, and what the application works with.

`loraplex serve` has the engine in its own process, a gateway of a cluster a client of replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.companion_files import MODULES_FILE, POOLING_FILE, read_pooling
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import PoolingPlan
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.shipped import shipped_folder
from loraplex_server.adapters.background_share import BackgroundShare
from loraplex_server.adapters.description_resolver import DescriptionResolver
from loraplex_server.adapters.device_pins import DevicePins
from loraplex_server.adapters.device_tier import DeviceTier
from loraplex_server.adapters.encoder_model import EncoderModel
from loraplex_server.adapters.example_trainer import ExampleTrainer
from loraplex_server.adapters.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.jobs import Jobs
from loraplex_server.adapters.learning import Learner, Learning
from loraplex_server.adapters.registration import register_adapters
from loraplex_server.adapters.sentence_encoder import SharedEncoder
from loraplex_server.adapters.training import Training
from loraplex_server.adapters.watched_folders import WatchedFolders
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.api.app import build_app
from loraplex_server.api.errors import invalid, unavailable
from loraplex_server.api.fleet import Fleet
from loraplex_server.api.middleware.rate_limit import Meter, RateLimiter
from loraplex_server.api.middleware.tracing import otlp_provider
from loraplex_server.api.state import AppState
from loraplex_server.api_keys import ApiKey
from loraplex_server.engine.client import EngineClient
from loraplex_server.engine.expert_monitor import ExpertMonitor
from loraplex_server.metrics.generation_collector import GenerationCollector
from loraplex_server.metrics.routing_collector import RoutingCollector
from loraplex_server.model.loader import Lazy
from loraplex_server.model.resident_weights import ResidentWeights

from .faults import Faults
from .settings import LearningConfig, ServerConfig

if TYPE_CHECKING:
    from loraplex_generation.service import Generator

__all__ = [
    "FrontEngine",
    "ServedBase",
    "build_front",
    "device_follows",
    "parts_of",
    "pooling_of_base",
    "public_name",
    "start_services",
    "stop_services",
    "store_root",
    "tell",
]

_LAST_EVENTS_S = 1.0  # for the engine's last events to reach the streams
_log = logging.getLogger(__name__)


class FrontEngine(EngineClient, DeviceTier, Protocol):
    """What generates, and where adapters lie on devices."""


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base model and its engine, as the front needs them."""

    engine: FrontEngine
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    name: str  # in public
    path: Path
    experts: ExpertMonitor | None  # None: the engine is in other processes
    weights: ResidentWeights | None  # to train through; None: the files' are mapped


def build_front(
    config: ServerConfig,
    base: ServedBase,
    store: AdapterStore,
    faults: Faults,
    closing: contextlib.ExitStack,
    *,
    registers: bool = True,
    meter_of: Callable[[ApiKey], Meter] = RateLimiter,
    fleet: Fleet | None = None,
    learner: Learner | None = None,
) -> FastAPI:
    """Registers what the config names, and builds the application. ``closing`` gets what to close.

    ``registers``: whether this process has the adapters of the config; of several one does.
    ``meter_of`` and ``fleet``: as of ``build_app``. ``learner``: another process, which learns for
    requests that bring their examples; None: this one does.
    Raises StoreError, ValueError or OSError.
    """
    endpoint = config.http.otlp_endpoint
    tracing = None if endpoint is None else otlp_provider(endpoint)
    if registers:
        register_adapters(store, config.store)
        watched = WatchedFolders(store, config.store.adapters_dirs)
        watched.scan()
    encoder = SharedEncoder(_encoder_directory, faults)
    folder = config.learning.generator_dir or shipped_folder()
    find_generator = _generator_finder(folder, encoder, base)
    pools = WorkerPools()
    jobs = Jobs(pools.jobs, faults)
    runs = jobs.runs if learner is None else lambda job: True  # there, and who knows which
    generated = GeneratedAdapters(store, find_generator, faults=faults, runs=runs)
    closing.callback(generated.close)
    learning: Learning | None = None
    if config.learning.threads > 0:
        trainer = _trainer(config.learning, find_generator, base, faults)
        max_budget_s = config.learning.max_budget_s
        learning = Learning(
            store, generated, jobs, trainer, pools.changes, max_budget_s=max_budget_s
        )
        closing.callback(learning.close)
    training: Training | None = None
    if config.learning.allow_training:
        training = Training(
            store,
            jobs,
            pools.changes,
            base=base.path,
            base_name=base.name,
            n_threads=config.learning.threads,
            max_budget_s=config.learning.max_budget_s,
            max_rank=config.engine.max_lora_rank,
        )
        closing.callback(training.close)
    descriptions = DescriptionResolver(store, encoder, generated, learner or learning)
    closing.callback(descriptions.close)
    app = build_app(
        base.engine,
        store,
        base.tokenizer,
        config,
        model_name=base.name,
        vocab_size=base.spec.vocab_size,
        device=base.engine,
        resolver=descriptions,
        generated=generated,
        learning=learning,
        training=training,
        pools=pools,
        jobs=jobs,
        collectors=[
            RoutingCollector(store, base.experts, descriptions.router),
            GenerationCollector(generated),
        ],
        semantic=descriptions.router,
        experts=base.experts,
        encoder=_encoder_model(encoder),
        pooling=pooling_of_base(base.path),
        tracing=tracing,
        faults=faults,
        meter_of=meter_of,
        fleet=fleet,
    )
    if registers:
        watched.start()
        closing.callback(watched.close)
    return app


def parts_of(app: FastAPI) -> AppState:
    services = app.state.parts
    assert isinstance(services, AppState)
    return services


async def start_services(services: AppState) -> asyncio.Task[None]:
    """What runs beside the requests; on the event loop that serves. The task ends with the loop."""
    device_follows(services)
    watching = asyncio.create_task(services.metrics.loop_lag.watch())
    await services.batches.resume()
    services.grammars.start()
    return watching


def device_follows(services: AppState) -> None:
    """Adapters that are pinned are so on the device, too, and those that retire leave it.

    Called on the event loop. It hears of a change before the call of the store that made it ends.
    """
    loop = asyncio.get_running_loop()
    if services.device is not None:
        pins = DevicePins(services.device)
        services.store.on_pinned(lambda digests: tell(loop, lambda: pins(digests)))
    services.store.on_retired(lambda digest: tell(loop, lambda: services.unloads.retired(digest)))


async def stop_services(services: AppState, drain_timeout_s: float) -> None:
    """Takes nothing new and waits for what runs; an error event for what is not done in time."""
    await services.batches.close()
    services.lifecycle.start_draining()
    n_live = len(services.live)
    if n_live:
        _log.info("draining: %d requests may finish within %g s", n_live, drain_timeout_s)
    if not await services.engine.drain(drain_timeout_s):
        _log.warning("drain timeout: the remaining requests end with an error event")
    # The engine has ended every request. Streams that miss its last event get one from here.
    deadline = asyncio.get_running_loop().time() + _LAST_EVENTS_S
    while services.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
    services.live.fail_all(unavailable("the server went down", "server_draining"))
    await services.grammars.close()


def store_root(config: ServerConfig, spec: BaseSpec) -> Path:
    """The folder of this base's adapters: each base has one of its own."""
    from loraplex_server.model.pull import loraplex_home

    return config.store.root or loraplex_home() / "adapters" / spec.fingerprint[:16]


def public_name(spec: str | None, model_path: Path) -> str:
    """A Hub id or packaged name as it is; of a local directory its last part, never the path."""
    from loraplex_server.model.pull import DEFAULT_BASE

    if spec is None:
        return DEFAULT_BASE
    return model_path.name if Path(spec).expanduser().is_dir() else spec


def pooling_of_base(model_path: Path) -> PoolingPlan | None:
    """Of a base that is a sentence-transformers model. Raises AdapterRefused for unknown modes."""
    present = [name for name in (MODULES_FILE, POOLING_FILE) if (model_path / name).is_file()]
    return read_pooling({name: (model_path / name).read_bytes() for name in present}, StoreLimits())


def tell(loop: asyncio.AbstractEventLoop, message: Callable[[], None]) -> None:
    """Runs ``message`` on the loop, from any thread. Nothing happens once the loop is closed."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: the device goes down with it
        loop.call_soon_threadsafe(message)


def _generator_finder(
    folder: Path, encoder: SharedEncoder, base: ServedBase
) -> Callable[[], Generator]:
    """Loads the generator of ``folder``, once. Raises GeneratorMismatch if it is for another base.

    A refusal is kept, too: it will not change, and nobody loads megabytes to be refused again.
    A quantised base is another base: what is generated or learned was judged on 16-bit weights.
    """
    from loraplex_generation.errors import GeneratorMismatch
    from loraplex_generation.service import Generator

    def load() -> Generator | str:
        if (quantization := base.spec.quantization) is not None:
            return (
                f"adapters are generated and learned for 16-bit weights, and {base.name!r} is "
                f"served with {quantization} ones; serve it without --quantization, or train the "
                "adapter elsewhere and register it"
            )
        try:
            return Generator.load(
                folder,
                encoder.get(),
                base_name=base.name,
                base_directory=base.path,
            )
        except GeneratorMismatch as error:
            return str(error)  # without its traceback, which holds what was loaded

    loaded = Lazy(load)

    def find() -> Generator:
        found = loaded.get()
        if isinstance(found, str):
            raise GeneratorMismatch(found)
        return found

    return find


def _trainer(
    config: LearningConfig,
    find_generator: Callable[[], Generator],
    served: ServedBase,
    faults: Faults,
) -> ExampleTrainer:
    from loraplex_generation.chat_base import ChatBase
    from loraplex_generation.frozen_base import FrozenBase
    from loraplex_generation.packing import ChatCodec

    codec = Lazy(lambda: ChatCodec(served.tokenizer))
    share = BackgroundShare(config.share, lambda: _is_serving(served.engine))
    # Elsewhere the weights are out of reach: the file's are mapped, which the system can take back.
    weights = None if served.weights is None else served.weights.resting(share.rest)
    base = Lazy(lambda: FrozenBase(served.path, weights=weights, mapped=True))
    return ExampleTrainer(
        find_generator,
        lambda: ChatBase(base.get(), codec.get()),
        codec.get,
        share,
        n_threads=config.threads,
        faults=faults,
    )


def _is_serving(engine: FrontEngine) -> bool:
    now = engine.stats()
    return now.n_running + now.n_waiting > 0


def _encoder_model(shared: SharedEncoder) -> EncoderModel | None:
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.pull import DEFAULT_ENCODER, resolve_encoder

    try:
        return EncoderModel.of(DEFAULT_ENCODER, resolve_encoder(), shared)
    except ModelError:
        return None


def _encoder_directory() -> Path:
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.pull import resolve_encoder

    try:
        return resolve_encoder()
    except ModelError as error:
        raise invalid(str(error), "adapter", "feature_not_enabled") from error
