"""``adapter: "auto"`` over the real router and the real sentence encoder."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.resolving import semantic_router
from loraplex_server.adapters.resolving.sentence_encoder import SharedEncoder
from loraplex_server.errors import invalid
from tests.server.conftest import Front, make_front
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model

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
    front, choosers = _front_with(lambda: pulled_encoder, tokenizer, base_spec, tmp_path)
    _put_profiles(front.store, front.root, PROFILES)
    front.engine.max_model_len = 4096  # tools make long prompts
    yield front
    choosers.close()
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


LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
ABOUT_RUM = [{"role": "user", "content": "Arr matey, tell me about rum and your ship"}]


@pytest.fixture
def with_caller(routed: Front) -> Front:
    """Beside the others an adapter whose card says that it is for requests with tools."""
    source = write_lora(routed.root / "caller", routed.store.base, seed=5)
    options = PutOptions(description="Calls tools", defaults={"auto": "with_tools"})
    routed.store.put_directory("caller", source, options=options)
    return routed


async def test_an_adapter_for_tools_is_preferred_where_there_are_tools(with_caller: Front) -> None:
    body = (await with_caller.chat(adapter="auto", messages=ABOUT_RUM, tools=[LOOK_UP])).json()
    assert body["adapter"]["name"] == "caller"
    assert body["adapter"]["chosen_by"]["for_tools"] is True
    names = [candidate["name"] for candidate in body["adapter"]["chosen_by"]["candidates"]]
    assert names == ["caller"]


@pytest.mark.parametrize("offered", [{}, {"tools": [LOOK_UP], "tool_choice": "none"}])
async def test_an_adapter_for_tools_is_no_candidate_without_tools(
    with_caller: Front, offered: dict[str, object]
) -> None:
    messages = [{"role": "user", "content": "Calls tools"}]  # the very words of its card
    body = (await with_caller.chat(adapter="auto", messages=messages, **offered)).json()
    assert body["adapter"]["name"] != "caller"
    names = {candidate["name"] for candidate in body["adapter"]["chosen_by"]["candidates"]}
    assert names == {"sql", "pirate"}


async def test_without_an_adapter_for_tools_a_request_with_tools_is_like_any_other(
    routed: Front,
) -> None:
    body = (await routed.chat(adapter="auto", messages=ABOUT_RUM, tools=[LOOK_UP])).json()
    assert body["adapter"]["name"] == "pirate"
    assert body["adapter"]["chosen_by"]["for_tools"] is False


async def test_a_card_can_keep_an_adapter_from_auto(with_caller: Front) -> None:
    answer = await with_caller.client.patch(
        "/v1/adapters/pirate", json={"defaults": {"auto": "never"}}
    )
    assert answer.status_code == 200
    body = (await with_caller.chat(adapter="auto", messages=ABOUT_RUM)).json()
    assert body["adapter"]["name"] != "pirate"
    names = {candidate["name"] for candidate in body["adapter"]["chosen_by"]["candidates"]}
    assert names == {"sql"}


async def test_auto_chooses_anew_where_the_chosen_one_was_just_deleted(
    routed: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic_router, "_LISTING_AGE_S", 3600.0)
    assert (await routed.chat(adapter="auto", messages=ABOUT_RUM)).status_code == 200
    assert (await routed.client.delete("/v1/adapters/pirate")).status_code == 200
    body = (await routed.chat(adapter="auto", messages=ABOUT_RUM)).json()
    names = [candidate["name"] for candidate in body["adapter"]["chosen_by"]["candidates"]]
    assert names == ["sql"]


async def test_auto_leaves_out_what_this_server_cannot_serve(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path, pulled_encoder: Path
) -> None:
    other = BaseSpec.of(tiny_model(seed=1), "tiny/llama")
    with AdapterStore(tmp_path / "store", other) as store:
        _put_profiles(store, tmp_path / "sources", ["pirate"])
    front, choosers = _front_with(lambda: pulled_encoder, tokenizer, base_spec, tmp_path)
    _put_profiles(front.store, tmp_path / "sources", ["sql"])
    body = (await front.chat(adapter="auto", messages=ABOUT_RUM)).json()
    names = [candidate["name"] for candidate in body["adapter"]["chosen_by"]["candidates"]]
    assert names == ["sql"]
    choosers.close()
    front.store.close()


async def test_auto_without_an_encoder_says_how_to_get_one(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    def missing() -> Path:
        raise invalid("run loraplex pull", "adapter", "feature_not_enabled")

    front, choosers = _front_with(missing, tokenizer, base_spec, tmp_path)
    front.store.put_directory(
        "x", write_lora(front.root / "x", base_spec), options=PutOptions(examples=["hi"])
    )
    answer = await front.chat(adapter="auto")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "feature_not_enabled"
    choosers.close()
    front.store.close()


async def test_an_encoder_that_could_not_be_loaded_is_tried_again(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path, pulled_encoder: Path
) -> None:
    directory = tmp_path / "encoder"
    shutil.copytree(pulled_encoder, directory)
    (directory / "model.safetensors").write_bytes(b"cut off")
    front, choosers = _front_with(lambda: directory, tokenizer, base_spec, tmp_path)
    front.store.put_directory(
        "x", write_lora(front.root / "x", base_spec), options=PutOptions(examples=["hi"])
    )
    answer = await front.chat(adapter="auto")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "encoder_unavailable"
    shutil.copy(pulled_encoder / "model.safetensors", directory)
    assert (await front.chat(adapter="auto")).status_code == 200
    choosers.close()
    front.store.close()


async def test_unnamed_generated_adapters_are_their_owners_candidates(routed: Front) -> None:
    spec = routed.store.base
    for name in ("generated/abc", "acme:generated/def", "acme:theirs", "mine"):
        source = write_lora(routed.root / name.replace("/", "-"), spec, seed=7)
        routed.store.put_directory(
            name, source, options=PutOptions(description="Translates to French")
        )
    messages = [{"role": "user", "content": "Translates to French"}]
    chosen_by = (await routed.chat(adapter="auto", messages=messages)).json()["adapter"][
        "chosen_by"
    ]
    names = [candidate["name"] for candidate in chosen_by["candidates"]]
    assert {"mine", "generated/abc"} <= set(names)
    assert not any("acme" in name for name in names)


def _put_profiles(store: AdapterStore, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        description, examples = PROFILES[name]
        seed = list(PROFILES).index(name)  # weights of its own
        source = write_lora(folder / name, store.base, seed=seed)
        options = PutOptions(description=description, examples=examples)
        store.put_directory(name, source, options=options)


def _front_with(
    find_encoder: Callable[[], Path],
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    folder: Path,
) -> tuple[Front, Choosers]:
    opened: list[Choosers] = []

    def parts(store: AdapterStore) -> dict[str, object]:
        opened.append(Choosers(store, SharedEncoder(find_encoder)))
        return opened[0].parts

    return make_front(tokenizer, base_spec, folder, with_store=parts), opened[0]
