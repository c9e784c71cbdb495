"""``prompt_logprobs`` over HTTP; log_softmax of transformers and PEFT judge."""

import asyncio
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.adapters.round_trip import randomise
from tests.support.bases.architectures import tiny_model
from tests.support.servers.engines import running_engine

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::UserWarning")]  # PEFT's advice
PROMPTS = ["the server keeps one base model", "Hello, wörld! many adapters " * 3]
K = 3


@pytest.fixture(scope="module")
def served(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    """A real engine whose prompts are computed in chunks of a few tokens."""
    with running_engine(tiny_model(), max_step_tokens=13) as engine:
        folder = tmp_path_factory.mktemp("served")
        front = make_front(tokenizer, base_spec, folder, packer=engine.packer, engine=engine)
        front.store.put_directory("lora", write_lora(front.root / "lora", base_spec, seed=3))
        front.store.put_directory("soft", _soft_prompt(front.root / "soft"))
        yield front
        front.close()


def _soft_prompt(folder: Path) -> Path:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(tiny_model(), config)
    randomise(tuned, 0.5, 1)
    tuned.save_pretrained(folder)
    return folder


def expected(front: Front, adapter: str | None, ids: Sequence[int]) -> torch.Tensor:
    """[len(ids), vocab_size]: row i is of the token behind ids[i]."""
    model: Any = copy.deepcopy(tiny_model())
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, front.root / adapter)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([list(ids)])).logits[0]
    return torch.log_softmax(logits[-len(ids) :], -1)


def check(found: list[Any], ids: Sequence[int], rows: torch.Tensor, k: int) -> None:
    assert len(found) == len(ids)
    assert found[0] is None
    for entry, token, row in zip(found[1:], ids[1:], rows, strict=False):
        best = row.topk(k).indices.tolist()
        assert next(iter(entry)) == str(token)
        assert {int(key) for key in entry} == {token, *best}
        for key, told in entry.items():
            assert told["logprob"] == pytest.approx(float(row[int(key)]), abs=1e-4)
            assert told["rank"] == int((row > row[int(key)]).sum()) + 1


@pytest.mark.parametrize("adapter", [None, "lora", "soft"])
async def test_completions_tell_of_each_prompt_what_the_oracle_says(
    served: Front, adapter: str | None
) -> None:
    """The prefix cache knows the prompts by the second round, which has to tell the same."""
    fields = {"prompt": PROMPTS, "adapter": adapter, "max_tokens": 2, "temperature": 0, "n": 2}
    tokenizer = served.app.state.parts.text.backend
    for _ in range(2):
        plain = (await served.complete(**fields)).json()
        answer = (await served.complete(**fields, prompt_logprobs=K)).json()
        for number, choice in enumerate(answer["choices"]):
            ids = tokenizer.encode(PROMPTS[number // 2]).ids
            check(choice["prompt_logprobs"], ids, expected(served, adapter, ids), K)
            assert choice["text"] == plain["choices"][number]["text"]
        assert all("prompt_logprobs" not in choice for choice in plain["choices"])


@pytest.mark.parametrize("adapter", [None, "lora"])
async def test_a_chat_tells_of_its_rendered_prompt(served: Front, adapter: str | None) -> None:
    messages = [{"role": "user", "content": "keep many adapters"}]
    ids = (await served.post("/tokenize", {"messages": messages})).json()["tokens"]
    answer = await served.chat(
        messages=messages, adapter=adapter, prompt_logprobs=0, max_tokens=1, n=3
    )
    body = answer.json()
    check(body["prompt_logprobs"], ids, expected(served, adapter, ids), 0)
    assert len(body["choices"]) == 3
    assert all("prompt_logprobs" not in choice for choice in body["choices"])


async def test_it_goes_with_echo_scoring_and_best_of(served: Front) -> None:
    """Each field shows as many tokens as it asks for itself."""
    fields = {"prompt": PROMPTS[0], "temperature": 0, "prompt_logprobs": 1}
    ids = served.app.state.parts.text.backend.encode(PROMPTS[0]).ids
    rows = expected(served, None, ids)
    scored = (await served.complete(**fields, echo=True, logprobs=4, max_tokens=0)).json()
    choice = scored["choices"][0]
    check(choice["prompt_logprobs"], ids, rows, 1)
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} <= {4, 5}
    few = (await served.complete(**{**fields, "prompt_logprobs": 9}, echo=True, logprobs=0)).json()
    choice = few["choices"][0]
    check(choice["prompt_logprobs"], ids, rows, 9)
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}
    best = (await served.complete(**fields, best_of=3, max_tokens=2)).json()
    check(best["choices"][0]["prompt_logprobs"], ids, rows, 1)


async def test_neighbours_in_the_batch_change_nothing(served: Front) -> None:
    fields = {"prompt": PROMPTS[1], "max_tokens": 4, "prompt_logprobs": 2, "seed": 5}
    alone = (await served.complete(**fields)).json()["choices"]
    others = [served.complete(prompt=f"{n} adapters", adapter="lora", max_tokens=9) for n in "abc"]
    together = (await asyncio.gather(served.complete(**fields), *others))[0].json()["choices"]
    assert together == alone


@pytest.fixture(scope="module")
def ending(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    """A model that says nothing to ``PROMPTS``: the most likely next token is an end token."""
    model = copy.deepcopy(tiny_model())
    encoded = [torch.tensor([tokenizer.backend_tokenizer.encode(text).ids]) for text in PROMPTS]
    with torch.no_grad():
        ends = [int(model(input_ids=ids).logits[0, -1].argmax()) for ids in encoded]
    model.generation_config.eos_token_id = ends
    with running_engine(model) as engine:
        folder = tmp_path_factory.mktemp("ending")
        front = make_front(tokenizer, base_spec, folder, packer=engine.packer, engine=engine)
        yield front
        front.close()


async def test_an_evaluation_sums_the_log_likelihood_of_a_whole_continuation(ending: Front) -> None:
    """lm-evaluation-harness leaves the last token out, since it takes it for the generated one."""
    backend = ending.app.state.parts.text.backend
    prompts = [backend.encode(text).ids for text in PROMPTS]
    fields = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    answer = (await ending.complete(**fields)).json()
    n_context = 3
    for ids, text, choice in zip(prompts, PROMPTS, answer["choices"], strict=True):
        rows = expected(ending, None, ids)
        told = choice["logprobs"]["token_logprobs"]
        truth = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
        assert sum(told[n_context:-1]) == pytest.approx(sum(truth[n_context - 1 :]), abs=1e-3)
        assert told[-1] == pytest.approx(float(rows[-1].max()), abs=1e-4)
        assert {len(values) for values in choice["logprobs"].values()} == {len(ids) + 1}
        assert choice["logprobs"]["text_offset"][-1] == len(text)
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert answer["usage"]["completion_tokens"] == len(PROMPTS)


async def test_the_end_token_is_among_ids_and_log_probabilities_also_of_streams(
    ending: Front,
) -> None:
    ids = ending.app.state.parts.text.backend.encode(PROMPTS[0]).ids
    row = expected(ending, None, ids)[-1]
    fields = {"temperature": 0, "logprobs": 2, "return_token_ids": True}
    choice = (await ending.complete(prompt=PROMPTS[0], **fields)).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["token_ids"] == [int(row.argmax())]
    assert choice["prompt_token_ids"] == ids
    assert choice["logprobs"]["token_logprobs"] == [pytest.approx(float(row.max()), abs=1e-4)]
    (event, done) = await ending.completion_events(prompt=PROMPTS[0], **fields)
    assert done == "[DONE]"
    assert event["choices"][0] == choice


async def test_only_the_first_of_n_choices_computes_its_prompt_for_it(front: Front) -> None:
    await front.complete(prompt=["one", "two"], n=2, prompt_logprobs=4)
    asked = [request.sampling.prompt_logprobs for request in front.engine.requests]
    assert asked == [4, None, 4, None]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt_logprobs": 21}, "20"),
        ({"prompt_logprobs": -1}, "0"),
        ({"prompt_logprobs": True}, "integer"),
        ({"prompt_logprobs": 1, "stream": True}, "streamed"),
    ],
)
async def test_what_is_not_given_is_a_400_that_names_the_field(
    front: Front, fields: dict[str, object], says: str
) -> None:
    for answer in (await front.chat(**fields), await front.complete(**fields)):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt_logprobs"
        assert says in answer.json()["error"]["message"]


async def test_an_answer_of_too_many_log_probabilities_is_refused(front: Front) -> None:
    front.engine.max_model_len, front.engine.max_queue = 4096, 64
    ids = [5] * 3000
    refused = await front.complete(prompt=[ids, ids, ids], prompt_logprobs=20)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt_logprobs"
    assert "131,072" in refused.json()["error"]["message"]
    assert (await front.complete(prompt=ids, prompt_logprobs=20, n=3)).status_code == 400
    whole = await front.complete(prompt=ids, prompt_logprobs=20, n=2)
    shown = json.loads(whole.content)["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in shown] == [3000, 3000]


@pytest.mark.parametrize("stream", [False, True])
async def test_those_of_an_echo_count_too(front: Front, stream: bool) -> None:
    front.engine.max_model_len, front.engine.max_queue = 4096, 64
    ids = [5] * 3000
    scored = {"echo": True, "logprobs": 20, "max_tokens": 1}
    refused = await front.complete(prompt=ids, **scored, n=3, stream=stream)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "logprobs"
    assert "131,072" in refused.json()["error"]["message"]
    assert not front.engine.requests
    whole = (await front.complete(prompt=ids, **scored, n=2)).json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in whole] == [3001, 3001]
    for few in ({"echo": False}, {"logprobs": None}, {"logprobs": 0}):
        answer = await front.complete(prompt=ids, **{**scored, **few}, n=3)
        assert answer.status_code == 200


async def test_those_of_both_fields_count_together(front: Front) -> None:
    front.engine.max_model_len, front.engine.max_queue = 4096, 64
    both = {"prompt": [5] * 3000, "echo": True, "logprobs": 20, "prompt_logprobs": 20}
    assert (await front.complete(**both)).status_code == 200
    refused = await front.complete(**both, n=2)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt_logprobs"
