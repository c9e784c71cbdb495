"""Expert load, decisions of ``auto``, generated adapters and training in /metrics."""

from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapter_store.store import AdapterStore
from loraplex_router.experts.load import ExpertLoad
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.engine.adapters.expert_monitor import ExpertMonitor

from .families import counter, gauge, summary

_WINDOW_S = 60.0
_MAX_ADAPTERS = 16  # the most recently used adapters
_MAX_LOAD_SERIES = 256  # adapter × expert


class RoutingCollector(Collector):
    """Shows the experts of at most 16 adapters, and 256 pairs of an adapter and an expert."""

    def __init__(
        self,
        store: AdapterStore,
        experts: ExpertMonitor | None,
        semantic: SemanticRouter | None,
        generated: GeneratedAdapters | None = None,
        training: TrainingThread | None = None,
    ) -> None:
        """``experts`` None: the engine runs in other processes."""
        self._store, self._experts = store, experts
        self._semantic, self._generated, self._training = semantic, generated, training

    def collect(self) -> Iterator[Metric]:
        if self._experts is not None:
            loads = recent_loads(self._experts)
            names = {card.digest: card.name for card in self._store.cards.all()} if loads else {}
            yield from expert_families(loads, names)
        if self._semantic is not None:
            routed = self._semantic.stats
            decisions = [(("adapter",), routed.n_chosen), (("base",), routed.n_base)]
            yield counter("loraplex_auto_decisions", ("to",), decisions)
            yield counter("loraplex_auto_seconds", (), [((), routed.seconds)])
        if self._generated is not None:
            made = self._generated.stats
            counts = {"made": made.n_made, "reused": made.n_reused, "refused": made.n_refused}
            outcomes = [((outcome,), count) for outcome, count in counts.items()]
            yield counter("loraplex_generations", ("outcome",), outcomes)
            yield summary("loraplex_generation_seconds", (), [((), made.n_made, made.seconds)])
        if self._training is not None:
            n_all, n_shared = self._training.n_batches, self._training.n_shared
            kinds = [(("no",), n_all - n_shared), (("yes",), n_shared)]
            yield counter("loraplex_training_batches", ("shared",), kinds)


def recent_loads(experts: ExpertMonitor) -> dict[str, ExpertLoad]:
    """Return the load of the last minute by digest, for the most recent adapters. Any thread."""
    digests = experts.digests()[:_MAX_ADAPTERS]
    loads = {digest: experts.load(digest, _WINDOW_S) for digest in digests}
    return {digest: load for digest, load in loads.items() if load is not None}


def expert_families(loads: Mapping[str, ExpertLoad], names: Mapping[str, str]) -> Iterator[Metric]:
    """Return the families of one engine, for the digests in ``names``."""
    used = {names[d]: load for d, load in loads.items() if load.n_rows and d in names}
    entropies = [((name,), load.entropy) for name, load in used.items()]
    yield gauge("loraplex_expert_entropy", ("adapter",), entropies)
    imbalances = [((name,), load.imbalance) for name, load in used.items()]
    yield gauge("loraplex_expert_imbalance", ("adapter",), imbalances)
    shares = [
        ((name, str(expert)), count / load.n_rows)
        for name, load in used.items()
        for expert, count in enumerate(load.per_expert)
    ]
    yield gauge("loraplex_expert_load", ("adapter", "expert"), shares[:_MAX_LOAD_SERIES])
