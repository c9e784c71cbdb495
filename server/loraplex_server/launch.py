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

from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.experts import arrow_prototypes
from loraplex_server.api.state import AppState

from .banner import banner
from .faults import Faults
from .front import (
    ServedBase,
    build_front,
    parts_of,
    public_name,
    start_services,
    stop_services,
    store_root,
)
from .limited_http import LimitedHttp
from .listening import reachable_url
from .running_servers import announced
from .settings import ServerConfig

if TYPE_CHECKING:
    from loraplex_server.engine.build import BuiltEngine

__all__ = ["banner_of", "freeze_gc", "open_store", "serve"]

_CLOSE_S = 5.0  # for connections to close once every request is answered
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
        model_path = resolve_model(config.model)
        name = public_name(config.model, model_path)
        faults = Faults()
        built = build_engine(config.engine, model_path, model_id=name, faults=faults)
        store = open_store(config, built, faults)
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
        )
        app = build_front(config, base, store, faults, closing)
        freeze_gc()
        closing.callback(gc.unfreeze)  # before the interpreter's last collection
        _run(app, config, listening, store.root, say)


def freeze_gc() -> None:
    """Exempts all objects that exist now from garbage collection.

    A full collection holds the interpreter's lock, and every stream waits: 0.2 s for the 400,000
    objects of torch, transformers and the model. Later ones look only at newer objects. One
    collection runs first, since garbage would be kept, too.
    """
    gc.collect()
    gc.freeze()


def open_store(
    config: ServerConfig,
    built: BuiltEngine,
    faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
) -> AdapterStore:
    from loraplex_server.engine.defaults import host_tier_bytes

    root = store_root(config, built.base_spec)
    shared = config.store.catalogue
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
        catalogue=None if shared is None else Catalogue.open(shared, built.base_spec),
        catalogue_limits=config.store.catalogue_limits,
    )


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
        say(banner_of(services, _url(listening)))
        waiting = asyncio.create_task(going_down.wait())
        with announced(loraplex_home(), _url(listening), services.model_root, root):
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


def _on_signal(going_down: asyncio.Event) -> None:
    if going_down.is_set():
        _log.warning("second signal: stopping at once")
        os._exit(1)
    going_down.set()


def _url(listening: socket.socket) -> str:
    return reachable_url(*listening.getsockname()[:2])


def banner_of(services: AppState, url: str) -> str:
    """What a server says once it is ready; ``url`` is where it is reached from this machine."""
    cards = services.store.seen()
    # the shortest prompt that a card shows: one that visibly does something
    shown = min(
        ((card.name, card.examples[0]) for card in cards if card.examples),
        key=lambda pair: len(pair[1]),
        default=(cards[0].name if cards else None, "Hello!"),
    )
    return banner(
        url,
        services.resolver.base_name,
        [card.name for card in cards],
        *shown,
        needs_key=bool(services.config.http.api_keys),
        model_note=f"context {services.engine.max_model_len}",
    )
