"""Every way to name an adapter, at every route that takes one: the answers are those of PEFT.

A route that cannot take a form says so with a 400.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from tests.support.adapters.choosers import Choosers
from tests.support.bases.word_encoder import WordEncoder
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.servers.server_process import save_tiny_model
from tests.vectors.conftest import Server, serving

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::Warning")]

TEXT = "Arr matey"
OTHER = "where is the rum"
WISH = "to French"
WEIGHTS = {"pirate": 0.7, "sql": 0.3}
N_TOKENS = 24
_EXAMPLES = {
    "pirate": ["Arr matey where is the rum", "Arr matey sing"],
    "sql": ["SQL: count the orders", "SQL: list the customers"],
}
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Route:
    path: str
    body: dict[str, Any]
    kind: str  # of answer, see Oracle
    read: Callable[[Any], object]  # what the oracle says, from the answer or a stream's events
    in_a_batch: bool = False


_CHAT = {
    "messages": [{"role": "user", "content": TEXT}],
    "max_tokens": N_TOKENS,
    "temperature": 0,
}
_COMPLETION = {"prompt": TEXT, "max_tokens": N_TOKENS, "temperature": 0}
_RESPONSE = {"input": TEXT, "max_output_tokens": N_TOKENS, "temperature": 0}
_STREAM = {"stream": True}


def _joined(events: list[Any], read: Callable[[Any], str | None]) -> str:
    return "".join(read(event) or "" for event in events)


def _chat_text(answer: Any) -> object:
    return answer["choices"][0]["message"]["content"]


def _chat_stream(events: list[Any]) -> object:
    return _joined(events, lambda event: event["choices"][0]["delta"].get("content"))


def _completion_text(answer: Any) -> object:
    return answer["choices"][0]["text"]


def _completion_stream(events: list[Any]) -> object:
    return _joined(events, lambda event: event["choices"][0]["text"])


def _response_text(answer: Any) -> object:
    return answer["output"][0]["content"][0]["text"]


def _response_stream(events: list[Any]) -> object:
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    return _joined(deltas, lambda event: event["delta"])


def _message_text(answer: Any) -> object:
    return answer["content"][0]["text"]


def _message_stream(events: list[Any]) -> object:
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    return _joined(deltas, lambda event: event["delta"]["text"])


def _vector(field: str) -> Callable[[Any], object]:
    return lambda answer: answer["data"][0][field]


def _rank(answer: Any) -> object:
    return answer["results"][0]["relevance_score"]


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TEXT_ROUTES = {
    "chat": Route(CHAT, _CHAT, "chat", _chat_text),
    "chat-stream": Route(CHAT, _CHAT | _STREAM, "chat", _chat_stream),
    "completions": Route(COMPLETIONS, _COMPLETION, "completion", _completion_text),
    "completions-stream": Route(
        COMPLETIONS, _COMPLETION | _STREAM, "completion", _completion_stream
    ),
    "responses": Route(RESPONSES, _RESPONSE, "chat", _response_text),
    "responses-stream": Route(RESPONSES, _RESPONSE | _STREAM, "chat", _response_stream),
    "messages": Route(MESSAGES, _CHAT, "chat", _message_text),
    "messages-stream": Route(MESSAGES, _CHAT | _STREAM, "chat", _message_stream),
    "batch-chat": Route(CHAT, _CHAT, "chat", _chat_text, in_a_batch=True),
    "batch-completions": Route(
        COMPLETIONS, _COMPLETION, "completion", _completion_text, in_a_batch=True
    ),
}
EMBEDDINGS = Route("/v1/embeddings", {"input": TEXT}, "vector", _vector("embedding"))
ROUTES = TEXT_ROUTES | {
    "embeddings": EMBEDDINGS,
    "batch-embeddings": Route(
        EMBEDDINGS.path, EMBEDDINGS.body, "vector", EMBEDDINGS.read, in_a_batch=True
    ),
    "pooling": Route("/pooling", {"input": TEXT}, "vector", _vector("data")),
    "score": Route("/score", {"text_1": TEXT, "text_2": OTHER}, "score", _vector("score")),
    "rerank": Route("/rerank", {"query": TEXT, "documents": [OTHER]}, "score", _rank),
}
CLASSIFY = Route("/classify", {"input": TEXT}, "classes", _vector("probs"))

FORMS: dict[str, tuple[Callable[[dict[str, str]], dict[str, Any]], str]] = {
    # form → (fields of the body from the digests of all contents, the oracle's model)
    "none": (lambda digests: {}, "base"),
    "base": (lambda digests: {"adapter": "base"}, "base"),
    "name": (lambda digests: {"adapter": "pirate"}, "pirate"),
    "model": (lambda digests: {"model": "pirate"}, "pirate"),
    "adapter_id": (lambda digests: {"adapter_id": "pirate", "adapter_source": "local"}, "pirate"),
    "lora_path": (lambda digests: {"lora_path": "pirate"}, "pirate"),
    "empty": (lambda digests: {"lora_path": None, "adapter_id": "", "loras": []}, "base"),
    "name@digest": (lambda digests: {"adapter": f"pirate@{digests['older'][:12]}"}, "older"),
    "model@digest": (lambda digests: {"model": f"pirate@{digests['older'][:12]}"}, "older"),
    "object": (
        lambda digests: {"adapter": {"name": "pirate", "digest": digests["older"]}},
        "older",
    ),
    "mixture": (
        lambda digests: {"adapter": [{"name": n, "weight": w} for n, w in WEIGHTS.items()]},
        "mixed",
    ),
    "auto": (lambda digests: {"adapter": "auto"}, "pirate"),
    "description": (lambda digests: {"adapter": {"description": WISH}}, "generated"),
}


_REFUSING = {
    **{name: route for name, route in ROUTES.items() if "stream" not in name},
    "classify": CLASSIFY,
    "count_tokens": Route(f"{MESSAGES}/count_tokens", {"messages": _CHAT["messages"]}, "", str),
    "tokenize": Route("/tokenize", {"prompt": TEXT}, "", str),
}
OTHER_NAMES: dict[str, object] = {
    "adaptor": "pirate",
    "adapters": ["pirate"],
    "lora": [{"id": 0, "scale": 1.0}],
    "loras": ["pirate"],
    "lora_name": "pirate",
    "lora_path": ["pirate"],
    "lora_request": {"lora_name": "pirate", "lora_int_id": 1},
    "extra_body": {"adapter": "pirate"},
}


class Oracle:
    """transformers' and PEFT's own answers, by the names of the contents."""

    def __init__(self, models: dict[str, Any], tokenizer: Any) -> None:
        self._models = models
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, str], object] = {}

    def answer(self, model: str, kind: str) -> object:
        if (model, kind) not in self._known:
            self._known[model, kind] = getattr(self, f"_{kind}")(self._models[model])
        return self._known[model, kind]

    def _chat(self, model: Any) -> str:
        text = self._tokenizer.apply_chat_template(
            _CHAT["messages"], tokenize=False, add_generation_prompt=True
        )
        return self._greedy(model, self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _completion(self, model: Any) -> str:
        return self._greedy(model, self._tokenizer(TEXT)["input_ids"])

    def _greedy(self, model: Any, ids: list[int]) -> str:
        found: list[int] = []
        while len(found) < N_TOKENS:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
            if token == self._tokenizer.eos_token_id:
                break
            found.append(token)
        return str(self._tokenizer.decode(found, skip_special_tokens=True))

    @torch.no_grad()
    def _vector(self, model: Any, text: str = TEXT) -> torch.Tensor:
        ids = torch.tensor([self._tokenizer(text)["input_ids"]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=-1)

    def _score(self, model: Any) -> torch.Tensor:
        return self._vector(model) @ self._vector(model, OTHER)

    @torch.no_grad()
    def _classes(self, model: Any) -> torch.Tensor:
        ids = torch.tensor([self._tokenizer(TEXT)["input_ids"]])
        probabilities: torch.Tensor = model(input_ids=ids).logits[0].softmax(-1)
        return probabilities


@dataclass
class World:
    server: Server
    oracle: Oracle
    digests: dict[str, str]

    async def ask(self, route: Route, fields: dict[str, Any]) -> object:
        """What the answer says."""
        body = {"model": "base", **route.body, **fields}
        if route.in_a_batch:
            result = await self.in_a_batch(route, body)
            assert result["response"]["status_code"] == 200, result
            return route.read(result["response"]["body"])
        answer = await self.server.client.post(route.path, json=body)
        assert answer.status_code == 200, answer.text
        return route.read(_events(answer) if body.get("stream") else answer.json())

    async def refused(self, route: Route, fields: dict[str, Any]) -> dict[str, Any]:
        """The error of a 400."""
        body = {"model": "base", **route.body, **fields}
        if route.in_a_batch:
            result = await self.in_a_batch(route, body)
            status, told = result["response"]["status_code"], result["response"]["body"]
        else:
            answer = await self.server.client.post(route.path, json=body)
            status, told = answer.status_code, answer.json()
        assert status == 400, told
        error: dict[str, Any] = told["error"]
        return error

    async def in_a_batch(self, route: Route, body: dict[str, Any]) -> Any:
        """The line of the output, or of the errors."""
        line = {"custom_id": "a", "method": "POST", "url": route.path, "body": body}
        client = self.server.client
        file = await client.post(
            "/v1/files", files={"file": ("a.jsonl", json.dumps(line))}, data={"purpose": "batch"}
        )
        made = await client.post(
            "/v1/batches",
            json={
                "input_file_id": file.json()["id"],
                "endpoint": route.path,
                "completion_window": "24h",
            },
        )
        ended = (await client.get(f"/v1/batches/{made.json()['id']}?timeout_s=60")).json()
        assert ended["status"] == "completed", ended
        output = ended["output_file_id"] or ended["error_file_id"]
        return json.loads((await client.get(f"/v1/files/{output}/content")).text)


def _events(answer: httpx.Response) -> list[Any]:
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(event) for event in data if event != "[DONE]"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def world(
    tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("routes")
    base = save_tiny_model(folder / "base")
    models = {"base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    spec = BaseSpec.of(models["base"], "tiny/llama")
    for seed, name in enumerate(("older", "pirate", "sql")):
        models[name] = _trained(base, folder / name, seed)
    models["judge"] = _trained(base, folder / "judge", 3, task="SEQ_CLS")
    mixed: Any = PeftModel.from_pretrained(_causal(base), folder / "pirate", "pirate")
    mixed.load_adapter(folder / "sql", "sql")
    mixed.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "mixed", combination_type="cat"
    )
    mixed.set_adapter("mixed")
    models["mixed"] = mixed.eval()
    made = ScriptedGenerator(spec).generate(AdapterGenerationRequest(WISH))
    (folder / "generated").mkdir()
    (folder / "generated/adapter_config.json").write_text(json.dumps(made.config))
    save_file(dict(made.tensors), folder / "generated/adapter_model.safetensors")
    models["generated"] = PeftModel.from_pretrained(_causal(base), folder / "generated").eval()

    with contextlib.ExitStack() as closing:

        def parts(store: AdapterStore) -> dict[str, Any]:
            generated = GeneratedAdapters(store, lambda: ScriptedGenerator(spec))
            choosers = Choosers(store, WordEncoder(), generated)
            closing.callback(generated.close)
            closing.callback(choosers.close)
            return {"generated": generated, **choosers.parts}

        async with serving(base, folder / "state", with_store=parts) as server:
            digests = {}
            for content, name in (
                ("older", "pirate"),
                ("pirate", "pirate"),
                ("sql", "sql"),
                ("judge", "judge"),
            ):
                options = {"description": name, "examples": json.dumps(_EXAMPLES.get(name, []))}
                digests[content] = (await server.put(name, folder / content, **options))["digest"]
            yield World(server, Oracle(models, AutoTokenizer.from_pretrained(base)), digests)


def _causal(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _trained(base: Path, folder: Path, seed: int, task: str = "CAUSAL_LM") -> Any:
    torch.manual_seed(seed)
    model = _causal(base)
    if task == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(
            base, dtype=torch.float32, num_labels=3
        )
    config = LoraConfig(task_type=task, r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    return tuned


def _check(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.tensor(found).shape == expected.shape
        assert (torch.tensor(found) - expected).abs().max() < _TOLERANCE
    else:
        assert found == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
async def test_an_adapter_answers_as_in_peft(route: str, form: str, world: World) -> None:
    fields, model = FORMS[form]
    found = await world.ask(ROUTES[route], fields(world.digests))
    _check(found, world.oracle.answer(model, ROUTES[route].kind))


@pytest.mark.parametrize("route", _REFUSING)
async def test_an_adapter_under_another_name_is_not_answered_by_the_base(
    route: str, world: World
) -> None:
    for name, value in OTHER_NAMES.items():
        error = await world.refused(_REFUSING[route], {name: value})
        assert error["param"] == name, error


async def test_fields_of_several_servers_must_agree(world: World) -> None:
    fields = {"adapter": "pirate", "adapter_id": "pirate", "lora_path": "sql"}
    assert (await world.refused(EMBEDDINGS, fields))["param"] == "lora_path"
    answer = await world.ask(EMBEDDINGS, {**fields, "lora_path": "pirate"})
    _check(answer, world.oracle.answer("pirate", "vector"))


@pytest.mark.parametrize("kind", ["chat", "completion", "vector", "score"])
async def test_the_contents_differ_at_every_route(kind: str, world: World) -> None:
    """Else the test above shows nothing."""
    contents = {model for _, model in FORMS.values()}
    answers = [world.oracle.answer(model, kind) for model in contents]
    shown = [
        a if isinstance(a, str) else torch.as_tensor(a).flatten()[:3].tolist() for a in answers
    ]
    assert len({str(one) for one in shown}) == len(contents)


async def test_auto_leaves_to_the_base_what_no_adapter_is_for(world: World) -> None:
    body = {"model": "base", "input": "boiling point of water", "adapter": "auto"}
    answer = await world.server.client.post("/v1/embeddings", json=body)
    assert answer.headers["x-loraplex-adapter"] == "base"
    plain = await world.server.data("/v1/embeddings", model="base", input=body["input"])
    assert answer.json()["data"][0]["embedding"] == plain[0]["embedding"]


@pytest.mark.parametrize("form", ["name", "model", "adapter_id", "name@digest"])
async def test_a_classifier_classifies(form: str, world: World) -> None:
    pinned = f"judge@{world.digests['judge'][:12]}"
    fields = {
        "name": {"adapter": "judge"},
        "model": {"model": "judge"},
        "adapter_id": {"adapter_id": "judge"},
        "name@digest": {"adapter": pinned},
    }[form]
    expected = world.oracle.answer("judge", "classes")
    _check(await world.ask(CLASSIFY, fields), expected)
    pooling = Route("/pooling", {"input": TEXT}, "classes", _vector("data"))
    _check(await world.ask(pooling, fields), expected)


@pytest.mark.parametrize(
    ("adapter", "code"),
    [
        ("base", "adapter_has_no_head"),
        ("pirate", "adapter_has_no_head"),
        ([{"name": "judge", "weight": 0.5}, {"name": "pirate", "weight": 0.5}], None),
        ({"arrow": ["judge", "pirate"]}, None),
        ("auto", "invalid_value"),
        ({"description": WISH}, "invalid_value"),
    ],
    ids=str,
)
async def test_classes_need_a_classifier_by_name(
    adapter: object, code: str | None, world: World
) -> None:
    error = await world.refused(CLASSIFY, {"adapter": adapter})
    assert code is None or error["code"] == code
    assert error["param"] == "adapter"
    assert "judge" in error["message"] or "classifier" in error["message"]


async def test_no_adapter_is_made_for_a_call_that_none_could_answer(world: World) -> None:
    for path, body in (
        ("/classify", {"input": "x"}),
        ("/pooling", {"input": "x", "task": "classify"}),
    ):
        route = Route(path, body, "classes", _vector("probs"))
        await world.refused(route, {"adapter": {"description": f"never made for {path}"}})
    cards = (await world.server.client.get("/v1/adapters")).json()
    assert "never made" not in json.dumps(cards)


@pytest.mark.parametrize("route", [route for route in TEXT_ROUTES if "stream" not in route])
async def test_a_classifier_writes_no_text_at_any_door(route: str, world: World) -> None:
    pinned = f"judge@{world.digests['judge'][:12]}"
    for fields in ({"adapter": "judge"}, {"adapter": pinned}):
        error = await world.refused(TEXT_ROUTES[route], fields)
        assert error["code"] == "adapter_is_classifier"
        assert "/classify" in error["message"]
    parts = [{"name": "judge", "weight": 1}, {"name": "pirate", "weight": 1}]
    assert "judge" in (await world.refused(TEXT_ROUTES[route], {"adapter": parts}))["message"]
