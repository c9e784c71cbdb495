"""POST /v1/adapters/generate, and descriptions inside requests."""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.learning.base_agreement import PROBES
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.settings.api_keys import parse_keys
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.choosers import Choosers
from tests.support.bases.word_encoder import WordEncoder
from tests.support.scripted_generator import ScriptedGenerator

pytestmark = pytest.mark.anyio


@pytest.fixture
def generator(base_spec: BaseSpec) -> ScriptedGenerator:
    return ScriptedGenerator(base_spec)


@pytest.fixture
def generating(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    generator: ScriptedGenerator,
) -> Iterator[Front]:
    with generating_front(tokenizer, base_spec, tmp_path, generator) as front:
        yield front


@contextlib.contextmanager
def generating_front(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    folder: Path,
    generator: ScriptedGenerator,
    http: HttpConfig | None = None,
) -> Iterator[Front]:
    """A front that can generate adapters."""
    with contextlib.ExitStack() as closing:

        def parts(store: AdapterStore) -> dict[str, object]:
            generated = GeneratedAdapters(store, lambda: generator)
            choosers = Choosers(store, WordEncoder(), generated)
            closing.callback(generated.close)
            closing.callback(choosers.close)
            return {"generated": generated, **choosers.parts}

        front = make_front(tokenizer, base_spec, folder, http, with_store=parts)
        yield front
    front.store.close()


async def test_a_name_that_a_route_has_is_refused_before_anything_is_made(
    generating: Front, generator: ScriptedGenerator
) -> None:
    answer = await generating.post(
        "/v1/adapters/generate", {"description": "to French", "name": "train"}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    assert "choose another name" in answer.json()["error"]["message"]
    assert generator.n_made == 0


async def test_an_empty_name_is_refused_and_is_no_way_around_the_keys_adapters(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"team-key").hexdigest()
    keys = parse_keys(
        f'[[key]]\nname = "team"\nsha256 = "{digest}"\nscope = "admin"\nadapters = ["team-a/*"]\n'
    )
    http = HttpConfig(api_keys=keys)
    with generating_front(
        tokenizer, base_spec, tmp_path, ScriptedGenerator(base_spec), http
    ) as front:
        front.headers = {"authorization": "Bearer team-key"}
        body = {"description": "to French"}
        assert (await front.post("/v1/adapters/generate", body)).status_code == 403
        answer = await front.post("/v1/adapters/generate", {**body, "name": ""})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
        named = {**body, "name": "team-a/french"}
        assert (await front.post("/v1/adapters/generate", named)).status_code == 201
        assert [card.name for card in front.store.list()] == ["team:team-a/french"]


async def test_a_description_becomes_an_adapter_that_can_be_named(generating: Front) -> None:
    answer = await generating.post(
        "/v1/adapters/generate", {"description": "to French", "name": "french"}
    )
    assert answer.status_code == 201, answer.text
    card = answer.json()
    assert card["name"] == "french"
    assert card["provenance"]["method"] == "scripted"
    assert answer.headers["etag"] == f'"{card["digest"]}"'
    reply = await generating.chat(adapter="french")
    assert reply.json()["adapter"]["digest"] == card["digest"]


async def test_the_etag_of_an_edited_adapter_is_its_cards(generating: Front) -> None:
    body = {"description": "to French"}
    first = await generating.post("/v1/adapters/generate", body)
    path = f"/v1/adapters/{first.json()['name']}"
    edited = await generating.client.patch(path, json={"description": "French"})
    again = await generating.post("/v1/adapters/generate", body)
    assert again.headers["etag"] == edited.headers["etag"] != first.headers["etag"]
    changed = await generating.client.patch(
        path, json={"description": "fr"}, headers={"If-Match": again.headers["etag"]}
    )
    assert changed.status_code == 200


async def test_a_description_inside_a_request_is_served_by_its_adapter(generating: Front) -> None:
    answer = await generating.chat(adapter={"description": "to French"})
    body = answer.json()
    assert body["adapter"]["chosen_by"]["description"] == "to French"
    assert body["adapter"]["chosen_by"]["method"] == "scripted"
    used = generating.engine.requests[0].adapter
    assert used is not None
    assert used.digest == body["adapter"]["digest"]


async def test_many_requests_with_one_description_make_one_adapter(
    generating: Front, generator: ScriptedGenerator
) -> None:
    wish = {"description": "to French"}
    answers = await asyncio.gather(*[generating.chat(adapter=wish) for _ in range(6)])
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["adapter"]["digest"] for answer in answers}) == 1
    assert generator.n_made == 1


async def test_a_strange_description_is_told_so_with_its_score(generating: Front) -> None:
    for answer in (
        await generating.chat(adapter={"description": "something strange"}),
        await generating.post("/v1/adapters/generate", {"description": "something strange"}),
    ):
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert error["code"] == "description_out_of_distribution"
        assert error["message"].index('send "examples"') < error["message"].index('"force": true')
        assert error["score"] == 0.9
        assert error["limit"] == 0.5
        assert error["nearest"] == [{"task": "card.de/plain", "similarity": 0.1}]
    assert not generating.engine.requests


async def test_force_generates_it_anyway(generating: Front) -> None:
    body = {"description": "something strange", "force": True}
    assert (await generating.post("/v1/adapters/generate", body)).status_code == 201


async def test_a_name_that_is_taken_is_not_overwritten(generating: Front) -> None:
    body = {"description": "to French", "name": "mine"}
    assert (await generating.post("/v1/adapters/generate", body)).status_code == 201
    again = await generating.post("/v1/adapters/generate", {**body, "description": "to German"})
    assert again.status_code == 412
    assert again.json()["error"]["code"] == "revision_conflict"


async def test_the_card_tells_how_much_of_unrelated_chat_is_left_as_it_was(
    generating: Front,
) -> None:
    def script(request: GenerationRequest) -> list[int]:
        return [10, 11, 12] if request.adapter is None else [10, 99]

    generating.engine.answer = script
    answer = await generating.post("/v1/adapters/generate", {"description": "to French"})
    assert answer.json()["base_agreement"] == pytest.approx(1 / 3, abs=1e-3)
    assert len(generating.engine.requests) == 2 * len(PROBES)
    assert all(card.n_leases == 0 for card in generating.store.list())


async def test_a_busy_engine_still_gives_the_adapter(generating: Front) -> None:
    generating.engine.max_queue = 0
    answer = await generating.post("/v1/adapters/generate", {"description": "to French"})
    assert answer.status_code == 201
    assert answer.json()["base_agreement"] is None


async def test_unknown_fields_and_methods_are_refused(generating: Front) -> None:
    for extra in ({"method": "magic"}, {"colour": "red"}, {"samples": 99}):
        body = {"description": "to French", **extra}
        assert (await generating.post("/v1/adapters/generate", body)).status_code == 400


async def test_prompts_are_part_of_what_is_asked_for(
    generating: Front, generator: ScriptedGenerator
) -> None:
    body = {"description": "to French", "prompts": [f"word {i}" for i in range(8)]}
    for asked in (body, {"description": "to French"}, body):
        assert (await generating.post("/v1/adapters/generate", asked)).status_code == 201
    assert generator.n_made == 2


async def test_unfit_prompts_are_told_so(generating: Front) -> None:
    body = {"description": "to French", "prompts": ["one"]}
    answer = await generating.post("/v1/adapters/generate", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unfit_prompts"
    assert answer.json()["error"]["param"] == "prompts"


async def test_a_server_that_cannot_generate_says_so(front: Front) -> None:
    answer = await front.post("/v1/adapters/generate", {"description": "to French"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "feature_not_enabled"


async def test_generating_and_deleting_one_name_at_the_same_time_breaks_nothing(
    generating: Front,
) -> None:
    """Sixteen of each, again and again: 201 or a plain 404, and in the end nothing is left."""
    body = {"description": "to French", "probe": False}
    made = await generating.post("/v1/adapters/generate", body)
    path = f"/v1/adapters/{made.json()['name']}"
    for _ in range(8):
        calls = [
            *[generating.post("/v1/adapters/generate", body) for _ in range(16)],
            *[generating.client.delete(path) for _ in range(16)],
        ]
        statuses = {answer.status_code for answer in await asyncio.gather(*calls)}
        assert statuses <= {200, 201, 404}
    await generating.client.delete(path)
    assert (await generating.client.get("/v1/adapters")).json()["data"] == []
    again = await generating.post("/v1/adapters/generate", body)
    assert (await generating.chat(adapter=again.json()["name"])).status_code == 200
