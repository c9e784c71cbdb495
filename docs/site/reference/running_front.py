"""The server's application around a tiny base: what it says of itself is true of any base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.engine.expert_monitor import ExpertMonitor
from loraplex_server.metrics.generation_collector import GenerationCollector
from loraplex_server.metrics.routing_collector import RoutingCollector
from tests.server.conftest import Front, make_front
from tests.support.architectures import tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.word_encoder import WordEncoder

__all__ = ["running_front"]


@contextmanager
def running_front() -> Iterator[Front]:
    router = SemanticRouter(WordEncoder(), lambda: ())

    def collectors(store: AdapterStore) -> Mapping[str, Any]:
        generated = GeneratedAdapters(store, _no_generator)
        routing = RoutingCollector(store, ExpertMonitor(), router)
        return {"generated": generated, "collectors": [routing, GenerationCollector(generated)]}

    with tempfile.TemporaryDirectory() as folder:
        spec = BaseSpec.of(tiny_model(), "tiny/llama")
        front = make_front(tiny_tokenizer(), spec, Path(folder), with_store=collectors)
        try:
            yield front
        finally:
            front.close()
            router.close()


def _no_generator() -> NoReturn:
    raise AssertionError("nothing is generated for the reference")
