"""Runs the server: build, listen, serve, drain, exit.

SIGTERM or Ctrl-C   /ready fails, new requests are refused, running requests finish within
                    drain_timeout_s, the rest end with an error event and [DONE], exit 0
a second signal     exit at once
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.content_loader import PlanCheck
from loraplex_adapter_store.contents.content_files import lock_directory
from loraplex_adapter_store.contents.packed_files import Packer
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_router.experts.gates import arrow_prototypes

from .banner import banner
from .connection_limit import N_SPARE, ConnectionLimit
from .front import build_front
from .health_tracker import HealthTracker
from .limited_http import LimitedHttp
from .listening import allow_open_files, reachable_url
from .running_servers import announced
from .served_base import ServedBase, store_root
from .services import parts_of, start_services, stop_services
from .settings.config import ConfigError, ServerConfig

_CLOSE_S = 5.0  # time for connections to close after the last answer
_KEEP_ALIVE_S = 75
_OTHER_FILES = 1024  # of the base, adapters and worker processes
_log = logging.getLogger(__name__)


def serve(
    config: ServerConfig, listening: socket.socket, *, say: Callable[[str], None] = print
) -> None:
    """Serve until a signal ends the server. Blocks.

    Raises ModelError, StoreError, ValueError or OSError during the start.
    """
    from transformers.utils import logging as transformers_logging

    from loraplex_server.engine.build import build_engine
    from loraplex_server.engine.defaults import host_tier_bytes

    from .model.loading.pull import public_name, resolve_model

    transformers_logging.disable_progress_bar()  # the bar would mix with the log
    with contextlib.ExitStack() as closing:
        check_folders(config)
        model_path = resolve_model(config.model)
        name = public_name(config.model, model_path)
        health_tracker = HealthTracker()
        closing.enter_context(health_tracker.listening())
        built = build_engine(config.engine, model_path, model_id=name)
        store = open_store(
            config,
            built.base_spec,
            store_root(config, built.base_spec),
            host_bytes=config.store.memory_bytes or host_tier_bytes(built.device),
            packer=built.engine.packer,
        )
        closing.callback(store.close)
        closing.callback(built.engine.close)
        base = ServedBase(
            engine=built.engine,
            tokenizer=built.tokenizer,
            spec=built.base_spec,
            name=name,
            path=model_path,
            experts=built.engine.experts,
            weights=built.weights,
            head=built.head,
            writes_text=built.writes_text,
            image_encoder=built.image_encoder,
        )
        app = build_front(config, base, store, health_tracker, closing)
        freeze_gc()
        closing.callback(gc.unfreeze)  # before the interpreter's last collection
        _run(app, config, listening, say)


def check_folders(config: ServerConfig) -> None:
    """Find before the base is loaded what would stop the start afterwards.

    Raises ConfigError for a missing adapter, StoreError or OSError for a state directory that
    another server uses or that cannot be written.
    """
    for name, path in config.store.lora_modules:
        if not path.is_dir():
            raise ConfigError(
                f"--lora-modules {name}={path}: there is no such folder; download an adapter of "
                "the Hub first, with `hf download`, or add it by `loraplex adapters add`"
            )
    root = config.store.root
    if root is not None:
        root.mkdir(parents=True, exist_ok=True)
        lock_directory(root)()  # the store locks it again, for as long as it is open


def freeze_gc() -> None:
    """Exempt all existing objects from garbage collection, after one last collection.

    A full collection of the 400,000 objects of torch, transformers and the model takes 0.2 s. It
    holds the interpreter's lock, so every stream would wait.
    """
    gc.collect()
    gc.freeze()


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a store that is a cache of the catalogue; a context deletes it."""
    return tempfile.TemporaryDirectory(prefix="loraplex-", ignore_cleanup_errors=True)


def open_store(
    config: ServerConfig,
    base: BaseSpec,
    root: Path,
    *,
    host_bytes: int,
    packer: Packer | None = None,
    check: PlanCheck | None = None,
) -> AdapterStore:
    """Open the store of the config in ``root``. Raises StoreError, ValueError or OSError.

    A process with an engine has a ``packer``, a gateway a ``check``.
    """
    root.mkdir(parents=True, exist_ok=True)
    catalogue = config.store.catalogue
    return AdapterStore(
        root,
        base,
        host_bytes=host_bytes,
        limits=StoreLimits(refuse_other_base=config.store.refuse_other_base),
        allowed_roots=[*config.store.adapters_dirs],
        engine=EngineHooks(gate_of=arrow_prototypes, packer=packer, check=check),
        n_kept_revisions=config.store.keep_revisions,
        catalogue=None if catalogue is None else Catalogue.open(catalogue, base),
        catalogue_limits=config.store.catalogue_limits,
    )


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers, which would cut streams off."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _run(
    app: FastAPI,
    config: ServerConfig,
    listening: socket.socket,
    say: Callable[[str], None],
) -> None:
    from .model.loading.pull import loraplex_home

    max_connections = config.http.max_connections
    # A new connection could not even be accepted, and no idle one closed for it, without a file.
    allow_open_files(max_connections + N_SPARE + _OTHER_FILES)
    limit = ConnectionLimit(max_connections)
    server = _Server(
        uvicorn.Config(
            app,
            http=partial(LimitedHttp, limit=limit),  # type: ignore[arg-type]  # a factory
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_CLOSE_S),
        )
    )
    services = parts_of(app)

    async def main() -> None:
        going_down = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, going_down)
        watching = await start_services(services)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        waiting = asyncio.create_task(going_down.wait())
        with announced(loraplex_home(), _url(listening)):
            say(banner(services, _url(listening)))
            await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await stop_services(services, config.http.drain_timeout_s)
        server.should_exit = True
        await serving
        watching.cancel()
        await services.text.close()

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(main())
    services.pools.close()
    _log.info("stopped")


def _on_signal(going_down: asyncio.Event) -> None:
    if going_down.is_set():
        _log.warning("second signal: stopping at once")
        os._exit(1)
    going_down.set()


def _url(listening: socket.socket) -> str:
    return reachable_url(*listening.getsockname()[:2])
