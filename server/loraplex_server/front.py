"""The front of a server: the application around an engine, and the parts that it works with.

`loraplex serve` runs the engine in the same process. A gateway of a cluster has a client instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from fastapi import FastAPI

from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.api.app import build_app
from loraplex_server.api.fleet import Fleet
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.api.middleware.tracing import otlp_provider
from loraplex_server.api.parts import (
    AdapterMakers,
    AdapterSelection,
    Limits,
    ServedEngine,
    ServedModel,
    Telemetry,
    Workers,
)
from loraplex_server.metrics.routing_collector import RoutingCollector

from .adapters.adding.adapter_folders import register_adapters
from .adapters.adding.watched_folders import WatchedFolders
from .adapters.fine_tuning.answer_scores import AnswerScorer
from .adapters.fine_tuning.training import Training
from .adapters.learning.example_learner import ExampleLearner
from .adapters.learning.generated_adapters import GeneratedAdapters
from .adapters.learning.jobs import Jobs
from .adapters.learning.learning import Learner, Learning
from .adapters.learning.store_methods import StoreMethods
from .adapters.learning.training_thread import TrainingThread
from .adapters.resolving.described_adapters import DescribedAdapters
from .adapters.resolving.semantic_router import SemanticRouter, routable_profiles
from .adapters.resolving.sentence_encoder import EncoderModel, SharedEncoder
from .errors import invalid
from .health_tracker import HealthTracker
from .learning_parts import generator_finder, starts_of, training_thread
from .served_base import ServedBase, pooling_of_base
from .settings.api_keys import ApiKey, log_admins
from .settings.config import ServerConfig
from .text.image_prompts import ImagePrompts


def build_front(
    config: ServerConfig,
    base: ServedBase,
    store: AdapterStore,
    health_tracker: HealthTracker,
    closing: contextlib.ExitStack,
    *,
    registers: bool = True,
    meter_of: Callable[[ApiKey], Meter] = Meter,
    fleet: Fleet | None = None,
    learner: Learner | None = None,
) -> FastAPI:
    """Add the adapters of the config, and build the application. ``closing`` closes its parts.

    ``registers``: this process adds the adapters of the config. ``learner``: the process that
    learns from examples; None: this process does. Raises StoreError, ValueError or OSError.
    """
    refused: Mapping[str, str] = {}
    if registers:
        log_admins(config.http.api_keys)
        register_adapters(store, config.store)
        watched = WatchedFolders(store, config.store.adapters_dirs)
        refused = watched.refused
        if fleet is not None:  # other processes of a cluster do not know which names are expected
            watched.scan()
    images = ImagePrompts.of(base.path)
    encoder = SharedEncoder(_encoder_directory)
    pools = WorkerPools()
    list_profiles = functools.partial(routable_profiles, store)
    router = SemanticRouter(encoder, list_profiles, pools.routing, pools.encoder)
    jobs = Jobs(pools.jobs)
    # Jobs of another process are unknown here, so each job counts as running.
    runs = jobs.runs if learner is None else lambda job: True
    learns = base.writes_text and images is None
    makers = _makers(
        config, base, store, encoder, Workers(pools, jobs), runs, closing, learns=learns
    )
    assert makers.generated is not None
    if learner is None and makers.learning is not None:
        learner = makers.learning.learn
    descriptions = DescribedAdapters(
        makers.generated, pools.generation, learner, makers.store_methods
    )
    endpoint = config.http.otlp_endpoint
    app = build_app(
        ServedEngine(base.engine, base.engine, base.experts),
        store,
        ServedModel(
            base.tokenizer,
            base.name,
            base.spec.vocab_size,
            pooling_of_base(base.path),
            _encoder_model(encoder, base.name),
            base.head,
            base.writes_text,
            images,
            base.image_encoder,
        ),
        config,
        selection=AdapterSelection(router, descriptions, refused),
        makers=makers,
        workers=Workers(pools, jobs),
        telemetry=Telemetry(
            health_tracker,
            (
                RoutingCollector(
                    store, base.experts, router, makers.generated, makers.training_thread
                ),
            ),
            None if endpoint is None else otlp_provider(endpoint),
        ),
        limits=Limits(meter_of),
        fleet=fleet,
    )
    if registers:
        watched.start()
        closing.callback(watched.close)
    return app


def _makers(
    config: ServerConfig,
    base: ServedBase,
    store: AdapterStore,
    encoder: SharedEncoder,
    workers: Workers,
    runs: Callable[[str], bool],
    closing: contextlib.ExitStack,
    *,
    learns: bool,
) -> AdapterMakers:
    """Build the parts that make adapters from descriptions, examples and chats.

    ``learns``: the base can be trained here: it writes text and sees no images.
    """
    options = config.learning
    find_generator = generator_finder(base.name, base.path)
    generated = GeneratedAdapters(store, find_generator, runs=runs)
    closing.callback(generated.close)
    thread: TrainingThread | None = None
    learning: Learning | None = None
    if options.n_threads > 0 and learns:
        thread = training_thread(options, base)
        closing.callback(thread.close)
        learning = Learning(
            generated,
            workers.jobs,
            ExampleLearner(thread, base.tokenizer, base.name, starts_of(find_generator)),
            workers.pools.changes,
            max_budget_s=options.max_budget_s,
        )
        closing.callback(learning.close)
    training: Training | None = None
    if options.allow_training and thread is not None:
        training = Training(
            store,
            workers.jobs,
            thread,
            workers.pools.jobs,
            base.tokenizer,
            AnswerScorer(
                base.engine, store, base.tokenizer, workers.pools.jobs, base_name=base.name
            ),
            base_name=base.name,
            max_len=base.engine.max_model_len,
            max_budget_s=options.max_budget_s,
        )
    store_methods = StoreMethods(
        store,
        base.engine,
        base.tokenizer,
        encoder.encode,
        workers.pools.generation,
        base_name=base.name,
        folder=options.generator_dir,
        writes_text=base.writes_text,
        reader=base.image_encoder,
    )
    return AdapterMakers(generated, learning, training, thread, store_methods)


def _encoder_model(shared: SharedEncoder, base_name: str) -> EncoderModel | None:
    """Return the encoder as a model of /v1/embeddings, or None if it is not on this machine.

    A base of the same name is served by the engine, with adapters.
    """
    from loraplex_server.model.errors import ModelError

    from .model.loading.pull import DEFAULT_ENCODER, resolve_encoder

    if base_name == DEFAULT_ENCODER:
        return None
    try:
        return EncoderModel.of(DEFAULT_ENCODER, resolve_encoder(), shared)
    except ModelError:
        return None


def _encoder_directory() -> Path:
    """Raises ApiError (400) with a remedy if the encoder is not on this machine."""
    from loraplex_server.model.errors import ModelError

    from .model.loading.pull import resolve_encoder

    try:
        return resolve_encoder()
    except ModelError as error:
        raise invalid(str(error), "adapter", "feature_not_enabled") from error
