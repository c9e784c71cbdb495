"""``adapter: "auto"`` over the real router and the real sentence encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.adapters.description_resolver import DescriptionResolver
from loraplex_server.api.errors import invalid
from tests.server.conftest import Front, make_front
from tests.support.lora_files import write_lora

pytestmark = pytest.mark.anyio

PROFILES = {
    "sql": ("Writes SQL queries for a question", ["Show all customers", "Count orders per month"]),
    "pirate": ("Answers like a pirate", ["Tell me about your ship, matey", "Arr, where is rum?"]),
}


@pytest.fixture
def routed(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    pulled_encoder: Path,
) -> Iterator[Front]:
    front = make_front(tokenizer, base_spec, tmp_path)
    resolver = DescriptionResolver(front.store, lambda: pulled_encoder)
    front.app.state.services.resolver._resolver = resolver
    for seed, (name, (description, examples)) in enumerate(PROFILES.items()):
        source = write_lora(front.root / name, base_spec, seed=seed)
        front.store.put_directory(name, source, description=description, examples=examples)
    yield front
    resolver.close()
    front.store.close()


async def test_auto_chooses_by_meaning_and_explains_itself(routed: Front) -> None:
    messages = [{"role": "user", "content": "Arr matey, tell me about rum and your ship"}]
    body = (await routed.chat(adapter="auto", messages=messages)).json()
    assert body["adapter"]["name"] == "pirate"
    chosen_by = body["adapter"]["chosen_by"]
    assert chosen_by["method"] == "auto"
    assert chosen_by["candidates"][0]["name"] == "pirate"
    assert routed.engine.requests[0].adapter is not None


async def test_auto_leaves_to_the_base_what_no_adapter_is_for(routed: Front) -> None:
    messages = [{"role": "user", "content": "What is the boiling point of water?"}]
    answer = await routed.chat(adapter="auto", messages=messages)
    assert answer.json()["adapter"]["name"] is None
    assert answer.json()["adapter"]["chosen_by"]["adapter"] is None
    assert answer.headers["x-loraplex-adapter"] == "base"
    assert routed.engine.requests[0].adapter is None


async def test_auto_without_an_encoder_says_how_to_get_one(front: Front) -> None:
    def missing() -> Path:
        raise invalid("run loraplex pull", "adapter", "feature_not_enabled")

    front.app.state.services.resolver._resolver = DescriptionResolver(front.store, missing)
    answer = await front.chat(adapter="auto")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "feature_not_enabled"
