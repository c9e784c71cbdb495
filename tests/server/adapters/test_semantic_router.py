from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from torch import Tensor

from loraplex_router.adapters import AdapterProfile
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.api_keys import AdapterAccess
from tests.support.word_encoder import WordEncoder

pytestmark = pytest.mark.anyio

PROFILES = [
    AdapterProfile("sql", "SQL", ("SQL: count the orders", "SQL: list the customers")),
    AdapterProfile("pirate", "pirate", ("Arr matey where is the rum", "Arr matey sing")),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class HeldEncoder(WordEncoder):
    """Waits for a word before it encodes, so that a test can pile up requests."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()

    def encode(self, texts: Sequence[str]) -> Tensor:
        assert self.may_go.wait(10)
        return super().encode(texts)


async def test_what_is_remembered_of_a_text_is_not_told_to_whom_it_is_closed() -> None:
    router = SemanticRouter(WordEncoder(), lambda: PROFILES)
    sql = AdapterAccess(("sql",))
    assert (await router.choose("Arr matey")).adapter == "pirate"
    for _ in range(2):
        closed = await router.choose("Arr matey", sql)
        assert closed.adapter != "pirate"
        assert [candidate.name for candidate in closed.candidates] == ["sql"]
    assert router.stats.n_remembered == 1
    router.close()


async def test_requests_that_wait_together_are_encoded_together() -> None:
    encoder = HeldEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES)
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
    router.close()


async def test_a_repeated_text_is_answered_from_memory_until_adapters_change() -> None:
    profiles = list(PROFILES)
    encoder = WordEncoder()
    router = SemanticRouter(encoder, lambda: profiles)
    first = await router.choose("Arr matey")
    n_batches = len(encoder.batches)
    assert await router.choose("Arr matey") == first
    assert len(encoder.batches) == n_batches
    assert router.stats.n_remembered == 1
    del profiles[1]
    router._listed_at = float("-inf")
    assert [c.name for c in (await router.choose("Arr matey")).candidates] == ["sql"]
    router.close()


async def test_what_is_remembered_of_a_long_text_is_short() -> None:
    """Or questions of megabytes, each another, would fill the memory."""
    encoder = WordEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES)
    question = "Arr matey " * 200
    first = await router.choose(question)
    n_batches = len(encoder.batches)
    assert await router.choose(question + "and more " * 100_000) == first
    assert len(encoder.batches) == n_batches
    assert router.stats.n_remembered == 1
    router.close()


async def test_an_encoder_that_cannot_load_fails_the_request_and_is_tried_again() -> None:
    class Flaky(WordEncoder):
        def encode(self, texts: Sequence[str]) -> Tensor:
            vectors = super().encode(texts)
            if len(self.batches) == 1:
                raise FileNotFoundError("run loraplex pull")
            return vectors

    router = SemanticRouter(Flaky(), lambda: PROFILES)
    with pytest.raises(FileNotFoundError, match="loraplex pull"):
        await router.choose("Arr matey")
    assert (await router.choose("Arr matey")).adapter == "pirate"
    router.close()


async def test_a_client_that_leaves_does_not_disturb_the_others() -> None:
    encoder = HeldEncoder()
    router = SemanticRouter(encoder, lambda: PROFILES)
    gone = asyncio.ensure_future(router.choose("Arr matey"))
    stays = asyncio.ensure_future(router.choose("SQL: count"))
    await asyncio.sleep(0)
    gone.cancel()
    encoder.may_go.set()
    assert (await stays).adapter == "sql"
    router.close()


async def test_a_closed_router_says_so() -> None:
    router = SemanticRouter(WordEncoder(), lambda: PROFILES)
    router.close()
    with pytest.raises(RuntimeError, match="closed"):
        await router.choose("hello")
