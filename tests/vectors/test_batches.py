"""Vectors beside chats: nobody's bits change, and long, preempted or cancelled requests are right.

Through HTTP on a real engine. What is compared with ``==`` is compared bit by bit.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.servers.asgi_call import AsgiCall
from tests.vectors.conftest import Server, Trained, serving

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::Warning")]

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps "
LONG = WORDS * 6
_TOLERANCE = 1e-4  # logits reach 20


def _near(found: object, expected: torch.Tensor) -> None:
    assert torch.tensor(found).shape == expected.shape
    assert (torch.tensor(found) - expected).abs().max() < _TOLERANCE


async def _chat(server: Server, number: int, model: str = "base") -> Any:
    answer = await server.post(
        "/v1/chat/completions",
        model=model,
        messages=[{"role": "user", "content": f"number {number}"}],
        max_tokens=24,
        seed=number,
        logprobs=True,
        top_logprobs=3,
        ignore_eos=True,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["content"]


@pytest.fixture
def adapters(train: Callable[..., Trained]) -> dict[str, Trained]:
    return {
        "mood": train("SEQ_CLS"),
        "tagger": train("TOKEN_CLS", n_labels=4),
        "features": train("FEATURE_EXTRACTION"),
    }


async def _check_vectors(
    server: Server, adapters: dict[str, Trained], texts: list[str], tokenizer: Any
) -> list[Any]:
    """Every kind of vector of every text at once, against PEFT; returns what came."""
    asked = [
        server.data("/classify", model="mood", input=texts, use_activation=False),
        server.data("/pooling", model="tagger", input=texts, use_activation=False),
        server.data("/v1/embeddings", model="features", input=texts, use_activation=False),
    ]
    classes, tags, vectors = await asyncio.gather(*asked)
    for index, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        _near(classes[index]["probs"], adapters["mood"].logits(ids))
        _near(tags[index]["data"], adapters["tagger"].logits(ids))
        _near(vectors[index]["embedding"], adapters["features"].hidden(ids).mean(0))
    return [classes, tags, vectors]


async def test_chats_beside_vectors_keep_every_bit(
    server: Server, adapters: dict[str, Trained], tokenizer: Any
) -> None:
    for name, adapter in adapters.items():
        await server.put(name, adapter.folder)
    await server.put("writer", adapters["features"].folder)
    names = ["base", "writer", "base", "writer"]
    alone = [await _chat(server, number, name) for number, name in enumerate(names)]
    chats = [_chat(server, number, name) for number, name in enumerate(names)]
    texts = [WORDS[:-number] for number in range(1, 9)]
    vectors = _check_vectors(server, adapters, texts, tokenizer)
    *together, _ = await asyncio.gather(*chats, vectors)
    assert together == alone


@pytest.mark.parametrize("changes", [{}, {"fuse": False}], ids=["fused", "modules"])
async def test_long_texts_are_read_in_chunks(
    changes: dict[str, Any],
    base: Path,
    tmp_path: Path,
    adapters: dict[str, Trained],
    tokenizer: Any,
) -> None:
    """A text in dozens of chunks, from steps of 16 tokens, has the same bits."""
    found = []
    for n_tokens in (16, 1024):
        state = tmp_path / str(n_tokens)
        async with serving(base, state, max_step_tokens=n_tokens, **changes) as server:
            for name, adapter in adapters.items():
                await server.put(name, adapter.folder)
            texts = [LONG, WORDS, LONG[5:]]
            found.append(await _check_vectors(server, adapters, texts, tokenizer))
    assert found[0] == found[1]


async def test_the_prefix_cache_changes_nothing(
    server: Server, adapters: dict[str, Trained], tokenizer: Any
) -> None:
    for name, adapter in adapters.items():
        await server.put(name, adapter.folder)
    texts = [LONG + str(number) for number in range(3)]
    first = await _check_vectors(server, adapters, texts, tokenizer)
    hits = server.engine.stats().prefix_hits
    assert await _check_vectors(server, adapters, texts, tokenizer) == first
    assert server.engine.stats().prefix_hits > hits  # a class needs the last token alone


@pytest.mark.parametrize(
    ("path", "model", "field"),
    [
        ("/v1/embeddings", "features", "embedding"),
        ("/classify", "mood", "probs"),
        ("/pooling", "tagger", "data"),
    ],
)
async def test_preempted_requests_begin_again(
    path: str,
    model: str,
    field: str,
    base: Path,
    tmp_path: Path,
    adapters: dict[str, Trained],
    tokenizer: Any,
) -> None:
    """An older chat grows until no page is left: the text that is half read gives its own back."""
    page = 2 * 3 * 2 * 16 * 16 * 4  # keys and values, layers, heads, width, tokens, bytes
    ids = tokenizer(LONG)["input_ids"]
    n_pages = -(-len(ids) // 16) + 4  # both fit at first: the chat has two
    memory = {"kv_memory_bytes": n_pages * page, "max_step_tokens": 4}
    async with serving(base, tmp_path / "state", **memory) as server:
        await server.put(model, adapters[model].folder)
        body = {
            "model": "base",
            "prompt": "go on",
            "max_tokens": 16 * n_pages - 32,
            "ignore_eos": True,
            "stream": True,
        }
        async with AsgiCall(server.app, "POST", "/v1/completions", body=body) as chat:
            assert await chat.next_body()  # it is the older one
            (found,) = await server.data(path, model=model, input=LONG, use_activation=False)
            await chat.rest()
        assert server.engine.stats().n_preemptions > 0
    trained = adapters[model]
    expected = trained.hidden(ids).mean(0) if model == "features" else trained.logits(ids)
    _near(found[field], expected)


@pytest.mark.parametrize("model", ["features", "mood"])
async def test_a_client_that_leaves_frees_everything(
    model: str, server: Server, adapters: dict[str, Trained], tokenizer: Any
) -> None:
    await server.put(model, adapters[model].folder)
    texts = [LONG + str(number) for number in range(300)]
    call = AsgiCall(server.app, "POST", "/pooling", body={"model": model, "input": texts})
    async with call:
        async with asyncio.timeout(60):
            while not server.engine.stats().n_running:
                await asyncio.sleep(0)
    # left: what was submitted is cancelled, what was not is never submitted
    async with asyncio.timeout(60):
        while await _n_leases(server, model) or server.engine.stats().n_running:
            await asyncio.sleep(0)
    assert server.engine.stats().n_waiting == 0
    (found,) = await server.data("/v1/embeddings", model=model, input=WORDS, use_activation=False)
    assert found["embedding"]


async def _n_leases(server: Server, name: str) -> int:
    return int((await server.client.get(f"/v1/adapters/{name}")).json()["n_leases"])
