"""What chooses adapters in a test server: the router of ``auto``, and descriptions."""

from functools import partial

from loraplex_adapter_store.store import AdapterStore
from loraplex_router.adapters.encoder import Encoder
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.learning.learning import Learner
from loraplex_server.adapters.resolving.described_adapters import DescribedAdapters
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter, routable_profiles
from loraplex_server.adapters.worker_pools import WorkerPools


class Choosers:
    """``parts`` are arguments of ``make_front``. Close it after the last request."""

    def __init__(
        self,
        store: AdapterStore,
        encoder: Encoder,
        generated: GeneratedAdapters | None = None,
        learner: Learner | None = None,
    ) -> None:
        self._pools = pools = WorkerPools()
        list_profiles = partial(routable_profiles, store)
        self.router = SemanticRouter(encoder, list_profiles, pools.routing, pools.encoder)
        self.descriptions = None
        if generated is not None:
            self.descriptions = DescribedAdapters(generated, pools.generation, learner)

    @property
    def parts(self) -> dict[str, object]:
        return {"router": self.router, "descriptions": self.descriptions}

    def close(self) -> None:
        self._pools.close()
