"""Runs the server: build, listen, serve, drain, exit.

SIGTERM or Ctrl-C   not ready → nothing new → running requests finish, at most drain_timeout_s
                    → an error event and [DONE] for the rest → exit 0
the same again      exit at once
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from loraplex_adapter_store.companion_files import MODULES_FILE, POOLING_FILE, read_pooling
from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import PoolingPlan
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.experts import arrow_prototypes
from loraplex_server.adapters.description_resolver import DescriptionResolver
from loraplex_server.adapters.encoder_model import EncoderModel
from loraplex_server.adapters.example_trainer import ExampleTrainer
from loraplex_server.adapters.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.jobs import Jobs
from loraplex_server.adapters.learning import Learning
from loraplex_server.adapters.registration import register_adapters
from loraplex_server.adapters.sentence_encoder import SharedEncoder
from loraplex_server.adapters.watched_folders import WatchedFolders
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.api.app import build_app
from loraplex_server.api.errors import invalid, unavailable
from loraplex_server.api.middleware.tracing import otlp_provider
from loraplex_server.api.state import AppState
from loraplex_server.metrics.generation_collector import GenerationCollector
from loraplex_server.metrics.routing_collector import RoutingCollector
from loraplex_server.model.loader import Lazy

from .banner import banner
from .faults import Faults
from .limited_http import LimitedHttp
from .running_servers import announced
from .settings import LearningConfig, ServerConfig

if TYPE_CHECKING:
    from loraplex_generation.service import Generator
    from loraplex_server.engine.build import BuiltEngine

__all__ = ["freeze_gc", "pooling_of_base", "serve"]

_CLOSE_S = 5.0  # for connections to close once every request is answered
_LAST_EVENTS_S = 1.0  # for the engine's last events to reach the streams
_KEEP_ALIVE_S = 75
_log = logging.getLogger(__name__)


def serve(
    config: ServerConfig, listening: socket.socket, *, say: Callable[[str], None] = print
) -> None:
    """Blocks until the server has gone down in good order; closes ``listening``.

    Raises ModelError, StoreError, ValueError or OSError while starting.
    """
    from transformers.utils import logging as transformers_logging

    from loraplex_server.engine.build import build_engine
    from loraplex_server.model.pull import resolve_model

    transformers_logging.disable_progress_bar()  # it would land in the middle of the log
    with contextlib.ExitStack() as closing:
        closing.callback(listening.close)
        endpoint = config.http.otlp_endpoint
        tracing = None if endpoint is None else otlp_provider(endpoint)
        model_path = resolve_model(config.model)
        public = _public_name(config.model, model_path)
        faults = Faults()
        built = build_engine(config.engine, model_path, model_id=public, faults=faults)
        store = open_store(config, built, faults)
        closing.callback(store.close)
        closing.callback(built.engine.close)
        register_adapters(store, config.store)
        watched = WatchedFolders(store, config.store.adapters_dirs)
        watched.scan()
        for card in store.list():
            if card.pinned:
                built.engine.set_pinned(card.digest, True)
        encoder = SharedEncoder(_encoder_directory, faults)
        quantization = built.base_spec.quantization
        find_generator = _generator_finder(encoder, model_path, public, quantization)
        generated = GeneratedAdapters(store, find_generator, faults=faults)
        closing.callback(generated.close)
        pools = WorkerPools()
        jobs = Jobs(pools.jobs, faults)
        learning: Learning | None = None
        if config.learning.threads > 0:
            trainer = _trainer(config.learning, find_generator, built, model_path, faults)
            max_budget_s = config.learning.max_budget_s
            learning = Learning(
                store, generated, jobs, trainer, pools.changes, max_budget_s=max_budget_s
            )
            closing.callback(learning.close)
        descriptions = DescriptionResolver(store, encoder, generated, learning)
        closing.callback(descriptions.close)
        app = build_app(
            built.engine,
            store,
            built.tokenizer,
            config,
            model_name=public,
            vocab_size=built.base_spec.vocab_size,
            device=built.engine,
            resolver=descriptions,
            generated=generated,
            learning=learning,
            pools=pools,
            jobs=jobs,
            collectors=[
                RoutingCollector(store, built.engine.experts, descriptions.router),
                GenerationCollector(generated),
            ],
            semantic=descriptions.router,
            experts=built.engine.experts,
            encoder=_encoder_model(encoder),
            pooling=pooling_of_base(model_path),
            tracing=tracing,
            faults=faults,
        )
        watched.start()
        closing.callback(watched.close)
        freeze_gc()
        closing.callback(gc.unfreeze)  # before the interpreter's last collection
        _run(app, config, listening, store_root(config, built), say)


def freeze_gc() -> None:
    """Exempts all objects that exist now from garbage collection.

    A full collection holds the interpreter's lock, and every stream waits: 0.2 s for the 400,000
    objects of torch, transformers and the model. Later ones look only at newer objects. One
    collection runs first, since garbage would be kept, too.
    """
    gc.collect()
    gc.freeze()


def store_root(config: ServerConfig, built: BuiltEngine) -> Path:
    """The folder of this base's adapters: each base has one of its own."""
    from loraplex_server.model.pull import loraplex_home

    return config.store.root or loraplex_home() / "adapters" / built.base_spec.fingerprint[:16]


def open_store(
    config: ServerConfig,
    built: BuiltEngine,
    faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
) -> AdapterStore:
    from loraplex_server.engine.defaults import host_tier_bytes

    root = store_root(config, built)
    root.mkdir(parents=True, exist_ok=True)
    roots: list[Path] = [*config.store.adapters_dirs]
    return AdapterStore(
        root,
        built.base_spec,
        host_bytes=config.store.memory_bytes or host_tier_bytes(built.device),
        allowed_roots=roots,
        gate_of=arrow_prototypes,
        packer=built.engine.packer,
        n_kept_revisions=config.store.keep_revisions,
        faults=faults,
    )


def _public_name(spec: str | None, model_path: Path) -> str:
    """A Hub id or packaged name as it is; of a local directory its last part, never the path."""
    from loraplex_server.model.pull import DEFAULT_BASE

    if spec is None:
        return DEFAULT_BASE
    return model_path.name if Path(spec).expanduser().is_dir() else spec


def _generator_finder(
    encoder: SharedEncoder, model_path: Path, base_name: str, quantization: str | None
) -> Callable[[], Generator]:
    """Loads the shipped generator, once. Raises GeneratorMismatch if it is for another base.

    A quantised base is another one: what is generated or learned was judged on 16-bit weights.
    That is kept, too: it will not change, and nobody loads megabytes to be refused again.
    """
    from loraplex_generation.errors import GeneratorMismatch
    from loraplex_generation.service import Generator
    from loraplex_generation.shipped import shipped_folder

    def load() -> Generator | str:
        if quantization is not None:
            return (
                f"adapters are generated and learned for 16-bit weights, and {base_name!r} is "
                f"served with {quantization} ones; serve it without --quantization, or train the "
                "adapter elsewhere and register it"
            )
        try:
            return Generator.load(
                shipped_folder(),
                encoder.get(),
                base_name=base_name,
                base_directory=model_path,
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
    built: BuiltEngine,
    model_path: Path,
    faults: Faults,
) -> ExampleTrainer:
    from loraplex_generation.chat_base import ChatBase
    from loraplex_generation.frozen_base import FrozenBase
    from loraplex_generation.packing import ChatCodec

    codec = Lazy(lambda: ChatCodec(built.tokenizer))
    # On a GPU the weights are out of reach: the file's are mapped, which the system can take back.
    base = Lazy(lambda: FrozenBase(model_path, weights=built.weights, mapped=True))
    return ExampleTrainer(
        find_generator,
        lambda: ChatBase(base.get(), codec.get()),
        codec.get,
        n_threads=config.threads,
        faults=faults,
    )


def _encoder_model(shared: SharedEncoder) -> EncoderModel | None:
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.pull import DEFAULT_ENCODER, resolve_encoder

    try:
        return EncoderModel.of(DEFAULT_ENCODER, resolve_encoder(), shared)
    except ModelError:
        return None


def pooling_of_base(model_path: Path) -> PoolingPlan | None:
    """Of a base that is a sentence-transformers model. Raises AdapterRefused for unknown modes."""
    present = [name for name in (MODULES_FILE, POOLING_FILE) if (model_path / name).is_file()]
    return read_pooling({name: (model_path / name).read_bytes() for name in present}, StoreLimits())


def _encoder_directory() -> Path:
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.pull import resolve_encoder

    try:
        return resolve_encoder()
    except ModelError as error:
        raise invalid(str(error), "adapter", "feature_not_enabled") from error


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would cut streams off without a last event."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _run(
    app: FastAPI,
    config: ServerConfig,
    listening: socket.socket,
    root: Path,
    say: Callable[[str], None],
) -> None:
    from loraplex_server.model.pull import loraplex_home

    server = _Server(
        uvicorn.Config(
            app,
            http=LimitedHttp,
            ws="none",
            limit_concurrency=config.http.max_connections,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_CLOSE_S),
        )
    )
    services = app.state.parts
    assert isinstance(services, AppState)

    async def main() -> None:
        going_down = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, going_down)
        services.store.on_retired(
            lambda digest: _tell(loop, lambda: services.unloads.retired(digest))
        )
        watching = asyncio.create_task(services.metrics.loop_lag.watch())
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        await services.batches.resume()
        say(_banner(services, listening))
        services.grammars.start()
        waiting = asyncio.create_task(going_down.wait())
        with announced(loraplex_home(), _url(listening), services.model_root, root):
            await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await services.batches.close()
        await _drain(services, config.http.drain_timeout_s)
        await services.grammars.close()
        server.should_exit = True
        await serving
        watching.cancel()
        await services.text.close()

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(main())
    services.pools.close()


def _on_signal(going_down: asyncio.Event) -> None:
    if going_down.is_set():
        _log.warning("second signal: stopping at once")
        os._exit(1)
    going_down.set()


def _tell(loop: asyncio.AbstractEventLoop, message: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the device goes down with it
        loop.call_soon_threadsafe(message)


async def _drain(services: AppState, timeout_s: float) -> None:
    services.lifecycle.start_draining()
    n_live = len(services.live)
    if n_live:
        _log.info("draining: %d requests may finish within %g s", n_live, timeout_s)
    if not await services.engine.drain(timeout_s):
        _log.warning("drain timeout: the remaining requests end with an error event")
    # The engine has ended every request. Streams that miss its last event get one from here.
    deadline = asyncio.get_running_loop().time() + _LAST_EVENTS_S
    while services.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
    services.live.fail_all(unavailable("the server went down", "server_draining"))


def _url(listening: socket.socket) -> str:
    """Where this machine reaches the server."""
    host, port = listening.getsockname()[:2]
    any_address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # nosec B104
    host = any_address.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def _banner(services: AppState, listening: socket.socket) -> str:
    cards = services.store.list()
    # the shortest prompt that a card shows: one that visibly does something
    shown = min(
        ((card.name, card.examples[0]) for card in cards if card.examples),
        key=lambda pair: len(pair[1]),
        default=(cards[0].name if cards else None, "Hello!"),
    )
    return banner(
        _url(listening),
        services.resolver.base_name,
        [card.name for card in cards],
        *shown,
        needs_key=bool(services.config.http.api_keys),
        model_note=f"context {services.engine.max_model_len}",
    )
