"""POST /v1/adapters/train: what is refused, what a job tells, an adapter that PEFT agrees on."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_server.settings.config import LearningConfig
from loraplex_training.config import RECIPES
from tests.server.conftest import Front
from tests.support.adapters.mixlora_module import MixLoraModule
from tests.support.bases.architectures import RARE_BASES, tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

TRAIN = "/v1/adapters/train"
PAIRS = [{"prompt": f"word {i}", "answer": "AB"} for i in range(24)]
CHATS = [
    {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": "AB"}]}
    for p in PAIRS
]
KEYS = {"acme": "admin", "umbra": "admin", "asks": "infer"}  # key and tenant → scope
ENDLESS = 10_000  # steps
NIGHTLY = pytest.mark.nightly


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("state")
    keys = folder / "keys.toml"
    keys.write_text(
        "\n".join(
            f'[[key]]\nname = "{name}"\ntenant = "{name}"\nscope = "{scope}"\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"'
            for name, scope in KEYS.items()
        )
    )
    keys.chmod(0o600)
    flags = ("--allow-training", "--keys", keys)
    limits = ("--max-learning-time", "300", "--max-lora-rank", "16")
    with server_process(tiny, folder / "store", *flags, *limits) as running:
        yield running


def _client(server: ServerProcess, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=300)


@pytest.fixture(scope="module")
def acme(server: ServerProcess) -> Iterator[httpx.Client]:
    with _client(server, "acme") as client:
        yield client


def _order(client: httpx.Client, **fields: object) -> str:
    body = {"name": "ab", "examples": PAIRS, "rank": 4, "lr": 0.02, "steps": 40, **fields}
    answer = client.post(TRAIN, json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return str(job["id"])


def _events(client: httpx.Client, job: str) -> Iterator[dict[str, Any]]:
    with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def _last(client: httpx.Client, job: str) -> dict[str, Any]:
    *_, last = _events(client, job)
    return last


def _cancel(client: httpx.Client, job: str) -> None:
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 200
    assert _last(client, job)["status"] == "cancelled"


def _wait_for_a_step(client: httpx.Client, job: str) -> dict[str, Any]:
    return next(state for state in _events(client, job) if state["training"]["step"] > 0)


@pytest.mark.anyio
async def test_a_server_that_was_not_started_for_it_trains_nothing(front: Front) -> None:
    answer = await front.post(TRAIN, {"name": "x", "examples": PAIRS})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "feature_not_enabled"
    assert "--allow-training" in error["message"]
    assert (await front.client.get("/version")).json()["features"]["train"] is False


def test_training_without_cores_for_it_stops_the_start() -> None:
    with pytest.raises(ValueError, match="learning-threads"):
        LearningConfig(allow_training=True, threads=0)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"examples": PAIRS[:1]}, 400, "examples"),
        ({"examples": [*PAIRS, {"prompt": "x"}]}, 400, "examples[24]"),
        ({"examples": [{"messages": [{"role": "user", "content": "x"}]}] * 2}, 400, "examples"),
        ({"examples": [{"messages": [{"role": "sage", "content": "x"}]}] * 2}, 400, "examples[0]"),
        ({"name": "a b"}, 400, "name"),
        ({"name": "generate"}, 400, "name"),
        ({"name": "generated/x"}, 403, "name"),
        ({"rank": 32}, 400, "rank"),
        ({"rank": 9, "recipe": "kasa"}, 400, "rank"),  # saved with twice the rank
        ({"recipe": "lora-xl"}, 400, "recipe"),
        ({"recipe": "kasa", "family": "dora"}, 400, "recipe"),
        ({"family": "magic"}, 400, "family"),
        ({"blocks": {"n_blocks": 2}}, 400, "blocks"),
        ({"family": "mixlora", "experts": {"n_experts": 2, "top_k": 3}}, 400, "experts"),
        ({"budget_s": 301}, 400, "budget_s"),
        ({"lr": 0}, 400, "lr"),
        ({"epochs": 3}, 400, "epochs"),
        ({"metric": "bleu"}, 400, "metric"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_names_the_field(
    acme: httpx.Client, change: dict[str, Any], status: int, param: str
) -> None:
    answer = acme.post(TRAIN, json={"name": "x", "examples": PAIRS, **change})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_a_key_that_may_only_ask_trains_nothing(server: ServerProcess) -> None:
    with _client(server, "asks") as client:
        answer = client.post(TRAIN, json={"name": "x", "examples": PAIRS})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")


def test_a_base_that_cannot_be_trained_is_refused_at_once(tmp_path: Path) -> None:
    model_type, config = RARE_BASES["gpt-oss"]
    tiny_model(model_type, **config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with (
        server_process(tmp_path / "base", tmp_path / "state", "--allow-training") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        answer = client.post(TRAIN, json={"name": "x", "examples": PAIRS})
        lines = "\n".join(map(json.dumps, CHATS)).encode()
        files = {"file": ("chats.jsonl", lines)}
        file = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files).json()
        order = {"model": "base", "training_file": file["id"]}
        tuned = client.post("/v1/fine_tuning/jobs", json=order)
    for refused in (answer, tuned):
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["code"] == "base_not_trainable"
        assert "attention sinks" in refused.json()["error"]["message"]


def test_a_tenant_trains_one_at_a_time_and_another_tenant_trains_beside_it(
    server: ServerProcess, acme: httpx.Client
) -> None:
    first = _order(acme, name="first", steps=ENDLESS, examples=CHATS)
    queued = [_order(acme, name=f"queued-{n}", steps=ENDLESS) for n in range(3)]
    busy = acme.post(TRAIN, json={"name": "fifth", "examples": PAIRS})
    assert (busy.status_code, busy.json()["error"]["code"]) == (429, "too_many_training_jobs")
    assert int(busy.headers["retry-after"]) >= 1
    assert _wait_for_a_step(acme, first)["training"]["n_examples"] == len(CHATS)

    with _client(server, "umbra") as umbra:
        assert umbra.get(f"/v1/jobs/{first}").status_code == 404
        ended = _last(umbra, _order(umbra, steps=6))
        assert ended["status"] == "succeeded", ended
    states = [acme.get(f"/v1/jobs/{job}").json() for job in (first, *queued)]
    assert {state["status"] for state in states} == {"running"}
    assert [state["stage"] for state in states] == ["training", *["queued"] * 3]

    _cancel(acme, queued[0])  # it has not begun
    _cancel(acme, first)
    _wait_for_a_step(acme, queued[1])
    for job in queued[1:]:
        _cancel(acme, job)
    assert acme.get("/v1/adapters/first").status_code == 404
    assert acme.get("/v1/adapters").json()["data"] == []


def test_examples_that_do_not_fit_fail_the_job_and_change_nothing(acme: httpx.Client) -> None:
    question, answer = CHATS[0]["messages"]
    long = {"messages": [{**question, "content": "word " * 1100}, answer]}
    job = _last(acme, _order(acme, name="long", examples=[*PAIRS, long]))
    assert (job["status"], job["error"]["code"]) == ("failed", "training_failed")
    assert "examples[24] has" in job["error"]["message"]
    assert "more than 1024" in job["error"]["message"]
    assert acme.get("/v1/adapters/long").status_code == 404


def test_what_was_trained_is_served_and_peft_finds_it_better_than_the_base(
    acme: httpx.Client, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    states = list(_events(acme, _order(acme, description="Says AB.", metric="contains")))
    steps = [state["training"] for state in states if state["training"]["step"]]
    assert states[-1]["status"] == "succeeded", states[-1]
    assert (steps[-1]["step"], steps[-1]["n_steps"], steps[-1]["stopped_by"]) == (40, 40, "steps")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["tokens_per_s"] > 0

    card = acme.get("/v1/adapters/ab").json()
    assert card["digest"] == states[-1]["digest"]
    assert (card["description"], card["ranks"]) == ("Says AB.", [4])
    told = card["provenance"]["training"]
    assert (told["n_examples"], told["n_validation"]) == (22, 2)
    scores = states[-1]["training"]["evaluation"]
    assert scores == told["evaluation"]
    assert (scores["metric"], scores["n_answers"], scores["score_before"]) == ("contains", 2, 0.0)
    assert scores["score_after"] == scores["gain"][0] > 0
    files = files_of(card["digest"], tmp_path_factory.getbasetemp())
    base = AutoModelForCausalLM.from_pretrained(tiny)
    alone = _losses(base, tiny)
    trained = PeftModel.from_pretrained(base, files)
    learnt = _losses(trained, tiny)
    assert sum(learnt) < 0.8 * sum(alone)
    assert told["validation_loss"] < 0.8 * told["base_validation_loss"]
    assert told["base_validation_loss"] == steps[0]["base_validation_loss"]
    asked = acme.post("/v1/chat/completions", json=_question("ab", 2)).json()
    assert asked["choices"][0]["token_ids"] == greedy(trained, tiny, "word 77", 2)

    again = acme.post(TRAIN, json={"name": "ab", "examples": PAIRS})
    assert (again.status_code, again.json()["error"]["code"]) == (412, "revision_conflict")
    replaced = _last(acme, _order(acme, replace=True, steps=1))
    assert replaced["digest"] == acme.get("/v1/adapters/ab").json()["digest"] != card["digest"]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=[] if recipe in ("lora-ga", "sora") else pytest.mark.nightly)
        for recipe in sorted(RECIPES)
    ],
)
def test_every_recipe_trains_and_is_served_as_peft_reads_it(
    acme: httpx.Client, tiny: Path, tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    name = f"by-{recipe}"
    last = _last(acme, _order(acme, name=name, recipe=recipe, steps=6, examples=PAIRS[:8]))
    assert last["status"] == "succeeded", last
    card = acme.get(f"/v1/adapters/{name}").json()
    assert card["provenance"]["training"]["recipe"] == recipe
    assert max(card["ranks"]) <= 4 * RECIPES[recipe]
    files = files_of(card["digest"], tmp_path_factory.getbasetemp())
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), files)
    asked = acme.post("/v1/chat/completions", json=_question(name, 4)).json()
    assert asked["choices"][0]["token_ids"] == greedy(trained, tiny, "word 77", 4)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("dora", {}),
        ("prefix", {"prefix": {"n_tokens": 4}}),
        ("mixlora", {"experts": {"n_experts": 3, "top_k": 2}}),
        pytest.param("block-lora", {"blocks": {"n_blocks": 2, "axis": "rank"}}, marks=NIGHTLY),
        pytest.param("block-lora", {"blocks": {"n_blocks": 2, "axis": "feature"}}, marks=NIGHTLY),
    ],
)
def test_every_family_trains_and_is_served_as_the_formula_reads_its_file(
    acme: httpx.Client,
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    fields: dict[str, object],
) -> None:
    name = f"family-{family}"
    order = _order(acme, name=name, family=family, steps=10, replace=True, **fields)
    last = _last(acme, order)
    assert last["status"] == "succeeded", last
    card = acme.get(f"/v1/adapters/{name}").json()
    told = card["provenance"]["training"]
    assert told["family"] == family
    assert told["validation_loss"] < told["base_validation_loss"]
    files = files_of(card["digest"], tmp_path_factory.getbasetemp())
    base = AutoModelForCausalLM.from_pretrained(tiny)
    trained = _read_by_formula(base, files, family)
    asked = acme.post("/v1/chat/completions", json=_question(name, 4)).json()
    assert asked["choices"][0]["token_ids"] == greedy(trained, tiny, "word 77", 4)


def _read_by_formula(base: Any, files: Path, family: str) -> Any:
    """Return the base with the adapter, by PEFT or by the formula of the paper."""
    if family in ("dora", "prefix"):
        return PeftModel.from_pretrained(base, files)
    tensors = {n: t.float() for n, t in load_file(files / "adapter_model.safetensors").items()}
    config = json.loads((files / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    if family == "mixlora":
        MixLoraModule(base, tensors, scale, config["top_k"])
        return base
    for name in [name for name in tensors if name.endswith("block_lora_A.weight")]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        module = base.get_submodule(
            name.removeprefix("base_model.model.").removesuffix(".block_lora_A.weight")
        )
        sum_of_b = b.sum(0) if b.ndim == 3 else b
        module.weight.data += scale * sum_of_b @ a.repeat(1, module.in_features // a.shape[1])
    return base


def test_a_budget_ends_a_training_with_what_it_learnt(acme: httpx.Client) -> None:
    job = _last(acme, _order(acme, name="short", steps=ENDLESS, budget_s=4))
    assert job["status"] == "succeeded", job
    assert job["training"]["stopped_by"] == "time"
    assert 0 < job["training"]["step"] < job["training"]["n_steps"] == ENDLESS
    told = acme.get("/v1/adapters/short").json()["provenance"]["training"]
    assert (told["steps_done"], told["stopped_by"]) == (job["training"]["step"], "time")
    assert told["seconds"] < 8  # a step that takes longer than those before may end late
    assert told["validation_loss"] < told["base_validation_loss"]

    job = _last(acme, _order(acme, name="none", budget_s=0.001))
    assert (job["status"], job["error"]["code"]) == ("failed", "training_failed")
    assert "before the first step" in job["error"]["message"]
    assert "raise budget_s" in job["error"]["message"]
    assert acme.get("/v1/adapters/none").status_code == 404


def _question(adapter: str, n_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "word 77"}],
        "adapter": adapter,
        "temperature": 0,
        "max_tokens": n_tokens,
        "return_token_ids": True,
    }


def files_of(digest: str, below: Path) -> Path:
    """The PEFT folder that a store keeps; in a cluster several do."""
    return next(
        path.parent
        for path in below.rglob("adapter_model.safetensors")
        if digest[:12] in str(path.parent)
    )


def _prompt(folder: Path, prompt: str) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids


@torch.no_grad()
def _losses(model: Any, folder: Path) -> list[float]:
    """Of the answers, by transformers, in nats a token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for pair in PAIRS[:8]:
        head = _prompt(folder, pair["prompt"])
        answer = tokenizer(pair["answer"], add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([head, answer], 1)
        labels = torch.cat([torch.full_like(head, -100), answer], 1)
        losses.append(float(model(input_ids=ids, labels=labels).loss))
    return losses


@torch.no_grad()
def greedy(model: Any, folder: Path, prompt: str, n_tokens: int) -> list[int]:
    """Return the likeliest tokens by forwards without a cache, in which PEFT loses a prefix."""
    text, tokens = _prompt(folder, prompt), list[int]()
    with torch.inference_mode():
        for _ in range(n_tokens):
            likeliest = model(input_ids=text, use_cache=False).logits[0, -1].argmax()
            text = torch.cat([text, likeliest.view(1, 1)], 1)
            tokens.append(int(likeliest))
            if tokens[-1] == model.generation_config.eos_token_id:
                break
    return tokens
