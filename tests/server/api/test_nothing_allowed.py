"""Fields that forbid every token are named; the adapter is not to blame."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.asgi_call import events_of
from tests.support.servers.engines import running_engine

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def served(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    with running_engine(tiny_model()) as engine:
        folder = tmp_path_factory.mktemp("served")
        front = make_front(tokenizer, base_spec, folder, packer=engine.packer, engine=engine)
        front.store.put_directory("lora", write_lora(front.root / "lora", base_spec))
        yield front
        asyncio.run(front.app.state.parts.grammars.close())
        front.close()


def told(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert "bad_words" in error["message"]
    return answer.status_code, error["param"], error["code"]


async def test_what_is_known_before_is_refused_before(front: Front) -> None:
    (token,) = front.app.state.parts.text.backend.encode("a").ids
    answer = await front.complete(allowed_token_ids=[token], bad_words=["a"])
    assert told(answer) == (400, "bad_words", "invalid_value")
    assert (await front.chat(allowed_token_ids=[token], bad_words=["a"])).status_code == 400
    assert not front.engine.requests
    answer = await front.complete(allowed_token_ids=[token, 7], bad_words=["a"])
    assert answer.status_code == 200


async def test_bad_words_of_a_call_are_encoded_once_for_all_its_prompts(front: Front) -> None:
    await front.complete(prompt=["one", "two", "three"], bad_words=["bad", "worse"])
    found = [request.sampling.bad_words for request in front.engine.requests]
    assert len(found) == 3
    assert all(words is found[0] for words in found)


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_dead_end_is_told_when_it_comes_and_a_neighbour_goes_on(
    served: Front, adapter: str | None, temperature: float
) -> None:
    """``zz`` is two tokens: the first is allowed, the second is not."""
    (token,) = served.app.state.parts.text.backend.encode("z").ids
    fields = {"adapter": adapter, "temperature": temperature, "seed": 3, "max_tokens": 8}
    plain = (await served.complete(**fields)).json()["choices"]
    dead = {"allowed_token_ids": [token], "bad_words": ["zz"]}
    answer, beside = await asyncio.gather(
        served.complete(**fields, **dead), served.complete(**fields)
    )
    assert told(answer) == (400, "bad_words", "no_token_allowed")
    assert beside.json()["choices"] == plain
    *_, last, done = events_of((await served.complete(**fields, **dead, stream=True)).content)
    assert last["error"]["code"] == "no_token_allowed"
    assert done == "[DONE]"
    assert (await served.client.get("/health")).json()["status"] == "ok"


@pytest.mark.parametrize(
    ("choice", "bad_words"),
    [
        (["no"], ["no"]),  # the grammar leaves no choice
        (["no", "yes"], ["n", "y"]),
        (["no", "yes"], ["no", "y"]),  # ``n`` may stand, ``o`` behind it may not
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_grammar_that_needs_a_bad_word_is_told_so(
    served: Front, choice: list[str], bad_words: list[str], temperature: float
) -> None:
    fields = {"guided_choice": choice, "temperature": temperature, "adapter": "lora"}
    answer = await served.complete(**fields, bad_words=bad_words)
    assert told(answer) == (400, "bad_words", "no_token_allowed")
    free = await served.complete(**fields, bad_words=["maybe"])
    assert free.json()["choices"][0]["text"] in ("no", "yes")
    assert (await served.client.get("/health")).json()["status"] == "ok"
