"""The server's application around a tiny base: what it says of itself is true of any base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.engine.adapters.expert_monitor import ExpertMonitor
from loraplex_server.metrics.routing_collector import RoutingCollector
from tests.server.conftest import Front, make_front
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.bases.word_encoder import WordEncoder

__all__ = ["running_front"]


@contextmanager
def running_front() -> Iterator[Front]:
    pools = WorkerPools()
    router = SemanticRouter(WordEncoder(), lambda: (), pools.routing, pools.encoder)

    def collectors(store: AdapterStore) -> Mapping[str, Any]:
        generated = GeneratedAdapters(store, _no_generator)
        routing = RoutingCollector(store, ExpertMonitor(), router, generated)
        return {"generated": generated, "collectors": [routing]}

    with tempfile.TemporaryDirectory() as folder:
        spec = BaseSpec.of(tiny_model(), "tiny/llama")
        front = make_front(tiny_tokenizer(), spec, Path(folder), with_store=collectors)
        try:
            yield front
        finally:
            front.close()
            pools.close()


def _no_generator() -> NoReturn:
    raise AssertionError("nothing is generated for the reference")
