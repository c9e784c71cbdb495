"""What an adapter's card says about requests: request over card, card over base; PATCH."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_server.adapters.adding.adapter_folders import register_adapters
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import HttpConfig, LoraModule, StoreConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora

pytestmark = pytest.mark.anyio
PIRATE = "/v1/adapters/pirate"


async def patch(front: Front, body: object, **headers: str) -> Any:
    return await front.client.patch(PIRATE, json=body, headers={**front.headers, **headers})


async def edited(front: Front, **defaults: object) -> None:
    answer = await patch(front, {"defaults": defaults})
    assert answer.status_code == 200, answer.text


def prompt_of(front: Front) -> str:
    ids = list(front.engine.requests[-1].prompt_ids)
    return front.engine.tokenizer.decode(ids, skip_special_tokens=False)


async def test_a_card_without_defaults_leaves_all_to_the_base(lora: Front) -> None:
    assert (await lora.client.get(PIRATE)).json()["defaults"] == {}
    await lora.chat(adapter="pirate")
    await lora.chat()
    ours, bases = (request.sampling for request in lora.engine.requests)
    assert ours == bases


async def test_the_request_wins_over_the_card_and_the_card_over_the_base(lora: Front) -> None:
    await edited(
        lora,
        sampling={"temperature": 0.5, "top_p": 0.25, "max_tokens": 7},
        stop=["END"],
        logit_bias={"3": 5, "4": 1},
    )
    await lora.chat(adapter="pirate", temperature=0.75, logit_bias={"4": -2})
    sampling = lora.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.75, 0.25, 7)
    assert sampling.logit_bias == {3: 5, 4: -2}
    await lora.chat(adapter="pirate", max_completion_tokens=9)
    assert lora.engine.requests[-1].sampling.max_tokens == 9
    await lora.complete(model="pirate")
    assert lora.engine.requests[-1].sampling.temperature == 0.5
    await lora.chat()
    assert lora.engine.requests[-1].sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
async def test_a_limit_of_the_card_refuses_no_request_that_sets_none(
    lora: Front, path: str, body: dict[str, object]
) -> None:
    await edited(lora, sampling={"max_tokens": 100_000})
    answer = await lora.post(path, {"model": "pirate", **body})
    assert answer.status_code == 200, answer.text
    request = lora.engine.requests[0]
    assert request.sampling.max_tokens == lora.engine.max_model_len - len(request.prompt_ids)


async def test_a_limit_of_the_card_is_no_more_than_the_keys(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    few = replace(ApiKey.of("few-tokens", Scope.INFER), tokens_per_minute=60)
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(api_keys=(few,)))
    source = write_lora(front.root / "pirate", base_spec, seed=0)
    options = PutOptions(defaults={"sampling": {"max_tokens": 90}})
    front.store.put_directory("pirate", source, options=options)
    front.headers = {"authorization": "Bearer few-tokens"}
    answer = await front.complete(model="pirate")
    assert answer.status_code == 200, answer.text
    request = front.engine.requests[0]
    assert request.sampling.max_tokens == 60 - len(request.prompt_ids)
    front.store.close()


async def test_documents_and_reasoning_effort_are_the_templates(lora: Front) -> None:
    await edited(lora, chat_template="{{ documents[0].title }}, {{ reasoning_effort }}")
    found = [{"title": "Kraken"}]
    for fields in (
        {"documents": found, "reasoning_effort": "low"},
        {"chat_template_kwargs": {"documents": found, "reasoning_effort": "low"}},
        {"documents": found, "chat_template_kwargs": {"documents": [], "reasoning_effort": "low"}},
    ):
        answer = await lora.chat(adapter="pirate", **fields)
        assert answer.status_code == 200, answer.text
        assert prompt_of(lora) == "Kraken, low"


async def test_the_effort_of_a_response_is_the_templates(lora: Front) -> None:
    await edited(lora, chat_template="{{ reasoning_effort }}")
    asked = {"model": "pirate", "input": "hi", "reasoning": {"effort": "low"}}
    answer = await lora.post("/v1/responses", asked)
    assert answer.status_code == 200, answer.text
    assert prompt_of(lora) == "low"
    assert answer.json()["reasoning"] == {"effort": "low", "summary": None}
    refused = await lora.post("/v1/responses", {**asked, "reasoning": {"summary": "auto"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning.summary")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
    ],
)
async def test_a_bias_of_the_card_is_felt_through_every_route(
    lora: Front, path: str, body: dict[str, object]
) -> None:
    await edited(lora, logit_bias={"3": 5, "4": -100})
    for model in ("pirate", "base"):
        answer = await lora.post(path, {"model": model, **body})
        assert answer.status_code == 200, answer.text
    ours, bases = (request.sampling.logit_bias for request in lora.engine.requests)
    assert (ours, bases) == ({3: 5, 4: -100}, {})


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]


@pytest.mark.parametrize("defaults", [{}, {"chat_template": TEMPLATE}])
@pytest.mark.parametrize("system", [None, "Arr."])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "hi"}]},
        {"tools": TOOLS},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "continue_final_message": True,
        },
    ],
    ids=["plain", "own system", "tools", "continued"],
)
async def test_tokenize_gives_the_ids_that_the_chat_begins_with(
    lora: Front, defaults: dict[str, object], system: str | None, fields: dict[str, object]
) -> None:
    lora.engine.max_model_len = 4096
    await edited(lora, **defaults, **({"system_prompt": system} if system else {}))
    body = {"messages": [{"role": "user", "content": "hi"}], "adapter": "pirate", **fields}
    assert (await lora.chat(**body)).status_code == 200
    told = (await lora.post("/tokenize", body)).json()["tokens"]
    assert told == list(lora.engine.requests[-1].prompt_ids)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
async def test_vectors_of_messages_are_of_the_prompt_that_a_chat_begins_with(
    lora: Front, path: str
) -> None:
    await edited(lora, system_prompt="Arr.", chat_template=TEMPLATE)
    body = {"messages": [{"role": "user", "content": "hi"}], "adapter": "pirate"}
    chat = (await lora.chat(**body)).json()
    answer = await lora.post(path, {**body, "add_generation_prompt": True})
    assert answer.json()["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    ours, vectors = lora.engine.requests
    assert vectors.prompt_ids == ours.prompt_ids
    assert prompt_of(lora) == "<system>Arr.<user>hi<assistant>"
    await lora.post(path, body)
    assert prompt_of(lora) == "<system>Arr.<user>hi"


async def test_stop_strings_of_the_card_end_an_answer_unless_the_request_has_its_own(
    lora: Front,
) -> None:
    lora.engine.answer = "one END two STOP three"
    await edited(lora, stop=["END"])
    told = [
        (await lora.chat(adapter="pirate")).json()["choices"][0]["message"]["content"],
        (await lora.chat(adapter="pirate", stop="STOP")).json()["choices"][0]["message"]["content"],
        (await lora.chat()).json()["choices"][0]["message"]["content"],
    ]
    assert told == ["one ", "one END two ", "one END two STOP three"]


async def test_the_system_prompt_of_the_card_is_a_default(lora: Front) -> None:
    await edited(lora, system_prompt="Speak like a pirate.")
    await lora.chat(adapter="pirate")
    assert "Speak like a pirate." in prompt_of(lora)
    own = [{"role": "system", "content": "Be plain."}, {"role": "user", "content": "hi"}]
    await lora.chat(adapter="pirate", messages=own)
    assert "pirate" not in prompt_of(lora)
    await lora.chat()
    assert "pirate" not in prompt_of(lora)


async def test_a_template_of_the_card_renders_the_chat(lora: Front) -> None:
    await edited(lora, chat_template="{% for m in messages %}<<{{ m.content }}>>{% endfor %}")
    await lora.chat(adapter="pirate")
    assert prompt_of(lora) == "<<hi>>"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_between_the_cards_markers_is_split_off(lora: Front, stream: bool) -> None:
    lora.engine.answer = "[plan]\nfirst this [/plan]\n\nThe answer."
    await edited(lora, reasoning={"open": "[plan]", "close": "[/plan]"})
    if stream:
        events = await lora.chat_events(adapter="pirate")
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        told = ["".join(d.get(k) or "" for d in deltas) for k in ("reasoning_content", "content")]
    else:
        message = (await lora.chat(adapter="pirate")).json()["choices"][0]["message"]
        told = [message["reasoning_content"], message["content"]]
    assert told == ["first this", "The answer."]


async def test_reasoning_that_the_prompt_opened_is_split_off(lora: Front) -> None:
    lora.engine.answer = "so it is</think>Yes."
    template = "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
    await edited(lora, chat_template=template)
    message = (await lora.chat(adapter="pirate")).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("so it is", "Yes.")
    await edited(lora, reasoning=False)
    message = (await lora.chat(adapter="pirate")).json()["choices"][0]["message"]
    assert message["content"] == "so it is</think>Yes."


async def test_calls_are_read_by_the_cards_response_template(lora: Front) -> None:
    """transformers' own format, here of a model that writes calls between other markers."""
    lora.engine.max_model_len = 4096
    lora.engine.answer = 'Well.[CALL]{"name": "f", "arguments": {"x": 1}}[/CALL]'
    await edited(
        lora,
        response_template={
            "start_anchor": "assistant\n",
            "fields": {
                "content": {},
                "tool_calls": {
                    "open": "[CALL]",
                    "close": "[/CALL]",
                    "content": "json",
                    "repeats": True,
                    "transform": {"type": "function", "function": "{content}"},
                },
            },
        },
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    choice = (await lora.chat(adapter="pirate", tools=tools)).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    assert choice["message"]["content"] == "Well."
    assert choice["finish_reason"] == "tool_calls"


async def test_a_patch_changes_what_it_names_and_null_takes_away(lora: Front) -> None:
    await edited(lora, sampling={"temperature": 0.5, "top_k": 3}, stop=["x"])
    answer = await patch(
        lora,
        {"description": "Arr", "defaults": {"sampling": {"top_k": None}, "stop": None}},
    )
    card = answer.json()
    assert card["defaults"] == {"sampling": {"temperature": 0.5}}
    assert card["description"] == "Arr"
    answer = await patch(lora, {"description": None, "defaults": None})
    assert answer.json()["defaults"] == {}
    assert answer.json()["description"] is None
    assert answer.json()["digest"] == card["digest"]  # the weights are the same


async def test_two_patches_from_the_same_card_conflict(lora: Front) -> None:
    seen = (await lora.client.get(PIRATE)).headers["etag"]
    first = await patch(lora, {"description": "one"}, **{"If-Match": seen})
    assert first.status_code == 200
    second = await patch(lora, {"description": "two"}, **{"If-Match": seen})
    assert second.status_code == 412
    assert second.headers["etag"] == first.headers["etag"]
    shown = await lora.client.get(PIRATE)
    assert shown.json()["description"] == "one"
    assert shown.headers["etag"] == first.headers["etag"] != seen
    third = await patch(lora, {"description": "three"}, **{"If-Match": second.headers["etag"]})
    assert third.status_code == 200
    taken = await lora.client.put(
        PIRATE, json={"source": "pirate"}, headers={**lora.headers, "If-None-Match": "*"}
    )
    assert taken.headers["etag"] == third.headers["etag"]


async def test_an_edited_card_is_there_after_a_restart(lora: Front) -> None:
    from loraplex_adapter_store.store import AdapterStore

    await edited(lora, sampling={"temperature": 0.5})
    lora.store.close()
    again = AdapterStore(lora.root.parent / "store", lora.store.base)
    try:
        card = again.get("pirate")
        assert card.defaults == {"sampling": {"temperature": 0.5}}
        assert card.etag == f"{card.digest}.1"
    finally:
        again.close()


async def test_defaults_come_with_an_upload_and_go_with_the_next_one(lora: Front) -> None:
    folder = lora.root / "pirate"
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": ("w", (folder / "adapter_model.safetensors").read_bytes()),
        "card.json": json.dumps(
            {"description": "d", "examples": ["e"], "defaults": {"sampling": {"top_k": 2}}}
        ).encode(),
    }
    answer = await lora.client.put("/v1/adapters/new", files=files)
    assert answer.status_code == 201, answer.text
    card = answer.json()
    assert (card["description"], card["examples"]) == ("d", ["e"])
    assert card["defaults"] == {"sampling": {"top_k": 2}}
    answer = await lora.client.put(
        "/v1/adapters/new", json={"source": "pirate", "defaults": {"stop": ["x"]}}
    )
    assert answer.json()["defaults"] == {"stop": ["x"]}


async def test_a_long_card_is_cut_wherever_it_is_from(lora: Front) -> None:
    folder = lora.root / "pirate"
    told = {"description": "d" * 2001, "examples": ["e" * 2001, *map(str, range(100))]}
    (folder / "card.json").write_text(json.dumps(told))
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": ("w", (folder / "adapter_model.safetensors").read_bytes()),
        "card.json": (folder / "card.json").read_bytes(),
    }
    put = lora.client.put
    source = await put("/v1/adapters/source", json={"source": "pirate"})
    upload = await put("/v1/adapters/upload", files=files)
    modules = (LoraModule("module", folder),)
    register_adapters(lora.store, StoreConfig(lora_modules=modules, demos=False))
    module = await lora.client.get("/v1/adapters/module")
    for answer in (source, upload, module):
        card = answer.json()
        assert answer.is_success, card
        assert card["description"] == "d" * 2000
        assert card["examples"] == ["e" * 2000, *map(str, range(99))]
    own = {"description": "mine", "examples": ["hi"]}
    card = (await put("/v1/adapters/source", json={"source": "pirate", **own})).json()
    assert {name: card[name] for name in own} == own


async def test_a_source_brings_its_card_and_the_request_wins(lora: Front) -> None:
    told = {"description": "d", "examples": ["e"], "defaults": {"sampling": {"top_k": 2}}}
    (lora.root / "pirate" / "card.json").write_text(json.dumps(told))
    new = "/v1/adapters/new"
    card = (await lora.client.put(new, json={"source": "pirate"})).json()
    assert {name: card[name] for name in told} == told
    own = {"description": "mine", "defaults": {"stop": ["x"]}}
    card = (await lora.client.put(new, json={"source": "pirate", **own})).json()
    assert {name: card[name] for name in told} == {**told, **own}
    card = (await lora.client.put(new, json={"source": "pirate", "defaults": {}})).json()
    assert card["defaults"] == {}
    loaded = {"lora_name": "vllm", "lora_path": str(lora.root / "pirate")}
    assert (await lora.post("/v1/load_lora_adapter", loaded)).status_code == 200
    card = (await lora.client.get("/v1/adapters/vllm")).json()
    assert {name: card[name] for name in told} == told


@pytest.mark.parametrize(
    ("card", "param"),
    [
        ("{", "card"),
        ("[]", "card"),
        ('{"description": 3}', "card"),
        ('{"examples": [1]}', "card"),
        ('{"defaults": []}', "card"),
        ('{"defaults": {"sampling": {"heat": 1}}}', "defaults.sampling.heat"),
    ],
)
async def test_a_wrong_card_of_a_source_is_refused_as_one_of_an_upload_is(
    lora: Front, card: str, param: str
) -> None:
    folder = lora.root / "pirate"
    (folder / "card.json").write_text(card)
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": ("w", (folder / "adapter_model.safetensors").read_bytes()),
        "card.json": card.encode(),
    }
    source = await lora.client.put("/v1/adapters/new", json={"source": "pirate"})
    upload = await lora.client.put("/v1/adapters/new", files=files)
    for answer in (source, upload):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert "card.json" in answer.json()["error"]["message"]
    assert source.json()["error"]["message"] == upload.json()["error"]["message"]
    assert (await lora.client.get("/v1/adapters/new")).status_code == 404


@pytest.mark.parametrize(
    ("defaults", "param"),
    [
        ({"sampling": {"temperature": 3}}, "defaults.sampling.temperature"),
        ({"sampling": {"heat": 1}}, "defaults.sampling.heat"),
        ({"colour": "red"}, "defaults.colour"),
        ({"stop": [""]}, "defaults.stop.0"),
        ({"logit_bias": {"x": 1}}, "defaults.logit_bias"),
        ({"response_template": {"fields": {}}}, "defaults.response_template"),
        (
            {"response_template": {"start_anchor_pattern": "(a+)+$", "fields": {"content": {}}}},
            "defaults.response_template",
        ),
        ({"reasoning": {"open": "<think>"}}, "defaults.reasoning"),
    ],
)
async def test_a_mistake_is_named_and_changes_nothing(
    lora: Front, defaults: dict[str, object], param: str
) -> None:
    answer = await patch(lora, {"defaults": defaults})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)
    assert (await lora.client.get(PIRATE)).json()["defaults"] == {}


async def test_an_unknown_adapter_has_no_card(lora: Front) -> None:
    answer = await lora.client.patch("/v1/adapters/nobody", json={"description": "x"})
    assert answer.status_code == 404


async def test_a_patch_is_json(lora: Front) -> None:
    headers = {"content-type": "text/plain"}
    answer = await lora.client.patch(PIRATE, content=b'{"description": "x"}', headers=headers)
    assert answer.status_code == 415
