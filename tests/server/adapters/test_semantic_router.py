from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex_router.adapters import AdapterProfile
from loraplex_server.adapters.routing_evaluation import (
    BASE,
    evaluate,
    held_out_prompts,
    plot,
    shipped_profiles,
)
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.adapters.sentence_encoder import MAX_TOKENS, MiniLmEncoder
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
    router = SemanticRouter(WordEncoder, lambda: PROFILES)
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
    router = SemanticRouter(lambda: encoder, lambda: PROFILES)
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
    router = SemanticRouter(lambda: encoder, lambda: profiles)
    first = await router.choose("Arr matey")
    n_batches = len(encoder.batches)
    assert await router.choose("Arr matey") == first
    assert len(encoder.batches) == n_batches
    assert router.stats.n_remembered == 1
    del profiles[1]
    router._listed_at = float("-inf")
    assert [c.name for c in (await router.choose("Arr matey")).candidates] == ["sql"]
    router.close()


async def test_an_encoder_that_cannot_load_fails_the_request_and_is_tried_again() -> None:
    attempts = 0

    def load() -> WordEncoder:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise FileNotFoundError("run loraplex pull")
        return WordEncoder()

    router = SemanticRouter(load, lambda: PROFILES)
    with pytest.raises(FileNotFoundError, match="loraplex pull"):
        await router.choose("Arr matey")
    assert (await router.choose("Arr matey")).adapter == "pirate"
    router.close()


async def test_a_client_that_leaves_does_not_disturb_the_others() -> None:
    encoder = HeldEncoder()
    router = SemanticRouter(lambda: encoder, lambda: PROFILES)
    gone = asyncio.ensure_future(router.choose("Arr matey"))
    stays = asyncio.ensure_future(router.choose("SQL: count"))
    await asyncio.sleep(0)
    gone.cancel()
    encoder.may_go.set()
    assert (await stays).adapter == "sql"
    router.close()


async def test_a_closed_router_says_so() -> None:
    router = SemanticRouter(WordEncoder, lambda: PROFILES)
    router.close()
    with pytest.raises(RuntimeError, match="closed"):
        await router.choose("hello")


def test_the_encoder_gives_unit_vectors_that_do_not_depend_on_the_batch(
    pulled_encoder: Path,
) -> None:
    encoder = MiniLmEncoder(pulled_encoder, dtype=torch.float32)
    texts = ["a cat", "A much longer sentence about the weather in Lisbon in spring.", "kitten"]
    together = encoder.encode(texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert float(together[0] @ together[2]) > float(together[0] @ together[1])
    long = "word " * (3 * MAX_TOKENS)
    assert encoder.encode([long]).shape == (1, encoder.dim)


def test_bfloat16_moves_cosines_by_less_than_a_hundredth(pulled_encoder: Path) -> None:
    texts = ["count the orders", "sing a shanty", "what is the capital of France?"]
    exact = MiniLmEncoder(pulled_encoder, dtype=torch.float32).encode(texts)
    quick = MiniLmEncoder(pulled_encoder, dtype=torch.bfloat16).encode(texts)
    assert float((exact @ exact.T - quick @ quick.T).abs().max()) < 0.01


def test_shipped_tasks_are_told_apart_and_unrelated_prompts_left_alone(
    pulled_encoder: Path, tmp_path: Path
) -> None:
    """The acceptance bar of ``auto``, on the cards of the adapters in the package."""
    profiles = shipped_profiles(Path(str(files("loraplex_adapter_store") / "demos")))
    assert len(profiles) >= 8
    router = SemanticRouter(lambda: MiniLmEncoder(pulled_encoder), lambda: profiles)
    result = evaluate(router, [p.name for p in profiles], n=40)
    router.close()
    assert result.right >= 0.95
    assert result.false_picks <= 0.02
    assert sum(result.confusion[BASE].values()) == 130
    plot(result, tmp_path / "auto.png")
    assert (tmp_path / "auto.png").stat().st_size > 1000


def test_held_out_prompts_are_on_no_card() -> None:
    from loraplex_training.demos import DEMOS
    from loraplex_training.demos.task import shown_prompts

    for demo in DEMOS.values():
        assert not set(shown_prompts(demo, 16)) & set(held_out_prompts(demo.name, 40))
