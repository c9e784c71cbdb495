import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest
from torch import Tensor

from loraplex_router.adapters.auto_router import AdapterProfile
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.settings.api_keys import AdapterAccess
from tests.support.bases.word_encoder import WordEncoder

pytestmark = pytest.mark.anyio

PROFILES = [
    AdapterProfile("sql", "SQL", ("SQL: count the orders", "SQL: list the customers")),
    AdapterProfile("pirate", "pirate", ("Arr matey where is the rum", "Arr matey sing")),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    made = WorkerPools()
    yield made
    made.close()


class HeldEncoder(WordEncoder):
    """Waits for a word before it encodes, so that a test can pile up requests."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()

    def encode(self, texts: Sequence[str]) -> Tensor:
        assert self.may_go.wait(10)
        return super().encode(texts)


async def test_a_key_that_may_not_use_an_adapter_gets_another_decision(
    pools: WorkerPools,
) -> None:
    router = SemanticRouter(WordEncoder(), lambda: PROFILES, pools.routing, pools.encoder)
    sql = AdapterAccess(("sql",))
    assert (await router.choose("Arr matey")).adapter == "pirate"
    for _ in range(2):
        closed = await router.choose("Arr matey", sql)
        assert closed.adapter != "pirate"
        assert [candidate.name for candidate in closed.candidates] == ["sql"]


async def test_requests_that_wait_together_are_encoded_together(pools: WorkerPools) -> None:
    encoder = HeldEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES, pools.routing, pools.encoder)
    first = asyncio.ensure_future(router.choose("Arr matey"))
    await asyncio.sleep(0)  # in the inbox
    others = [asyncio.ensure_future(router.choose(f"SQL: query {i}")) for i in range(5)]
    await asyncio.sleep(0)
    encoder.may_go.set()
    decisions = [await first, *await asyncio.gather(*others)]
    assert decisions[0].adapter == "pirate"
    queries = [t for batch in encoder.batches for t in batch if t.startswith("SQL: query")]
    batches = [batch for batch in encoder.batches if any(t.startswith("SQL: query") for t in batch)]
    assert len(queries) == 5
    assert len(batches) <= 2


async def test_a_repeated_text_is_encoded_once(pools: WorkerPools) -> None:
    profiles = list(PROFILES)
    encoder = WordEncoder()
    router = SemanticRouter(encoder, lambda: profiles, pools.routing, pools.encoder)
    first = await router.choose("Arr matey")
    n_batches = len(encoder.batches)
    assert await router.choose("Arr matey") == first
    assert len(encoder.batches) == n_batches
    del profiles[1]
    router._listed_at = float("-inf")
    assert [c.name for c in (await router.choose("Arr matey")).candidates] == ["sql"]


async def test_of_a_long_text_the_beginning_decides(pools: WorkerPools) -> None:
    """Or questions of megabytes, each another, would fill the memory."""
    encoder = WordEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES, pools.routing, pools.encoder)
    question = "Arr matey " * 200
    first = await router.choose(question)
    n_batches = len(encoder.batches)
    assert await router.choose(question + "and more " * 100_000) == first
    assert len(encoder.batches) == n_batches


async def test_an_encoder_that_cannot_load_fails_the_request_and_is_tried_again(
    pools: WorkerPools,
) -> None:
    class Flaky(WordEncoder):
        def encode(self, texts: Sequence[str]) -> Tensor:
            vectors = super().encode(texts)
            if len(self.batches) == 1:
                raise FileNotFoundError("run loraplex pull")
            return vectors

    router = SemanticRouter(Flaky(), lambda: PROFILES, pools.routing, pools.encoder)
    with pytest.raises(FileNotFoundError, match="loraplex pull"):
        await router.choose("Arr matey")
    assert (await router.choose("Arr matey")).adapter == "pirate"


async def test_a_client_that_leaves_does_not_disturb_the_others(pools: WorkerPools) -> None:
    encoder = HeldEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES, pools.routing, pools.encoder)
    gone = asyncio.ensure_future(router.choose("Arr matey"))
    stays = asyncio.ensure_future(router.choose("SQL: count"))
    await asyncio.sleep(0)
    gone.cancel()
    encoder.may_go.set()
    assert (await stays).adapter == "sql"


async def test_a_tenants_text_goes_between_the_pieces_of_another_tenants(
    pools: WorkerPools,
) -> None:
    encoder = HeldEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES, pools.routing, pools.encoder)
    flood = [
        asyncio.ensure_future(router.choose(f"SQL: query {i} {'x' * 1000}", tenant="flood"))
        for i in range(200)
    ]
    await asyncio.sleep(0)
    one = asyncio.ensure_future(router.choose("Arr matey", tenant="small"))
    await asyncio.sleep(0)
    encoder.may_go.set()
    assert (await one).adapter == "pirate"
    assert sum(each.done() for each in flood) <= 32  # of the turn that had begun
    assert {(await each).adapter for each in flood} == {"sql"}
