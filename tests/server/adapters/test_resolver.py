"""Which adapter a request means, in every form that clients use."""

import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora

pytestmark = pytest.mark.anyio


def digest(front: Front, name: str) -> str:
    return front.store.get(name).digest


@pytest.mark.parametrize(
    ("fields", "name", "model"),
    [
        ({"adapter": "pirate"}, "pirate", "base:pirate"),
        ({"adapter": {"name": "pirate"}}, "pirate", "base:pirate"),
        ({"adapter": "org/poet"}, "org/poet", "base:org/poet"),
        ({"adapter_id": "pirate"}, "pirate", "base:pirate"),
        ({"model": "pirate"}, "pirate", "pirate"),
        ({"model": "org/poet"}, "org/poet", "org/poet"),
        ({"model": "base:pirate"}, "pirate", "base:pirate"),
        ({"model": "pirate", "adapter": "pirate"}, "pirate", "pirate"),
        ({"model": None, "adapter": "pirate"}, "pirate", "base:pirate"),
    ],
)
async def test_each_form_of_naming_an_adapter_reaches_its_weights(
    lora: Front, fields: dict[str, object], name: str, model: str
) -> None:
    answer = await lora.chat(**fields)
    assert answer.status_code == 200, answer.text
    adapter = lora.engine.requests[0].adapter
    assert adapter is not None
    assert adapter.digest == digest(lora, name)
    assert answer.json()["model"] == model
    assert answer.json()["adapter"] == {"name": name, "digest": digest(lora, name)}
    assert answer.headers["x-loraplex-adapter"] == f"{name}@{digest(lora, name)[:12]}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": ""},
        {"model": None},
        {"adapter": None},
        {"adapter": "base"},
        {"adapter_id": ""},
        {"model": "tiny-public"},
    ],
)
async def test_nothing_and_the_base_s_names_mean_the_base(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    fields: dict[str, object],
) -> None:
    http = HttpConfig(served_model_names=("tiny-public",))
    front = make_front(tokenizer, base_spec, tmp_path, http)
    answer = await front.chat(**fields)
    assert answer.status_code == 200, answer.text
    assert front.engine.requests[0].adapter is None
    assert answer.headers["x-loraplex-adapter"] == "base"
    front.store.close()


async def test_a_digest_pins_the_very_content(lora: Front) -> None:
    prefix = digest(lora, "pirate")[:10]
    assert (await lora.chat(adapter=f"pirate@{prefix}")).status_code == 200
    assert (await lora.chat(adapter={"name": "pirate", "digest": prefix})).status_code == 200
    answer = await lora.chat(adapter="pirate@" + "0" * 8)
    assert answer.status_code == 404, answer.text


async def test_a_mixture_is_one_adapter_of_its_own(lora: Front) -> None:
    mixture = [{"name": "pirate", "weight": 0.7}, {"name": "org/poet", "weight": 0.3}]
    answer = await lora.chat(adapter=mixture)
    assert answer.status_code == 200, answer.text
    adapter = lora.engine.requests[0].adapter
    assert adapter is not None
    assert adapter.digest not in {digest(lora, "pirate"), digest(lora, "org/poet")}
    assert "0.7*pirate" in answer.headers["x-loraplex-adapter"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"adapter": "pirat"}, "adapter", "adapter_not_found"),
        ({"adapter": [{"name": "pirate"}, {"name": "nobody"}]}, "adapter", "adapter_not_found"),
        ({"adapter_id": "pirat"}, "adapter_id", "adapter_not_found"),
        ({"model": "pirat"}, "model", "model_not_found"),
        ({"model": "base:pirat"}, "model", "model_not_found"),
        ({"model": "gpt 4 ✨"}, "model", "model_not_found"),
    ],
)
async def test_an_unknown_name_is_a_404_that_names_what_exists(
    lora: Front, fields: dict[str, object], param: str, code: str
) -> None:
    for stream in (False, True):
        answer = await lora.chat(stream=stream, **fields)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (param, code)
        assert "pirate" in error["message"]
    assert not lora.engine.requests  # never a silent answer of the base


@pytest.mark.parametrize("other", ["org/poet", "base"])
async def test_two_fields_that_contradict_each_other_are_a_400(lora: Front, other: str) -> None:
    answer = await lora.chat(model="pirate", adapter=other)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "adapter"


@pytest.mark.parametrize("adapter", ["auto", {"description": "talk like a pirate"}])
async def test_routing_and_generation_say_that_they_are_not_enabled(
    lora: Front, adapter: object
) -> None:
    answer = await lora.chat(adapter=adapter)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "feature_not_enabled"
    assert answer.json()["error"]["param"] == "adapter"


async def test_the_lease_is_given_back_after_the_engine_s_last_event(lora: Front) -> None:
    await lora.chat(adapter="pirate")
    await lora.chat(adapter="pirate", stream=True)
    await lora.chat(adapter="pirate", stop="ello")
    await lora.chat(adapter="pirate", temperature=9)
    await lora.chat(adapter="pirate", max_tokens=5000)
    assert lora.store.get("pirate").n_leases == 0


async def test_a_full_queue_gives_the_lease_back(lora: Front) -> None:
    lora.engine.max_queue = 2
    answer = await lora.chat(adapter="pirate", n=3)
    assert answer.status_code == 429
    assert lora.engine.n_running == 0
    assert lora.store.get("pirate").n_leases == 0


async def test_a_client_that_leaves_gives_the_lease_back(lora: Front) -> None:
    lora.engine.manual = True
    body = {"adapter": "pirate", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with lora.call("/v1/chat/completions", body) as call:
        await lora.engine.arrival()
        assert lora.store.get("pirate").n_leases == 1
        await call.leave()
    assert lora.store.get("pirate").n_leases == 0


async def test_an_adapter_s_own_chat_template_wins_over_the_base_s(
    front: Front, base_spec: BaseSpec
) -> None:
    template = "{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}"
    source = write_lora(front.root / "own", base_spec, chat_template=template)
    front.store.put_directory("own", source)
    await front.chat(adapter="own")
    await front.chat()
    own, base = (
        front.engine.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
        for request in front.engine.requests
    )
    assert own == "<<hi>>"
    assert base.startswith("<|im_start|>user")
    answer = await front.post(
        "/tokenize", {"adapter": "own", "messages": [{"role": "user", "content": "hi"}]}
    )
    assert answer.json()["tokens"] == list(front.engine.requests[0].prompt_ids)


async def test_adapters_in_memory_do_not_wait_behind_those_that_are_loaded(lora: Front) -> None:
    lora.store.acquire("pirate").release()
    loading = threading.Event()
    pools = lora.app.state.parts.pools
    loads = [pools.loads._pool.submit(loading.wait) for _ in range(50)]
    try:
        assert (await lora.chat(adapter="pirate")).status_code == 200
        assert (await lora.chat()).status_code == 200
    finally:
        loading.set()
        for load in loads:
            load.result()
