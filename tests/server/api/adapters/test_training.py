"""POST /v1/adapters/train: what is refused, what a job tells, an adapter that PEFT agrees on."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.adapters.learning.jobs import Jobs
from loraplex_server.adapters.learning.training import Training
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import HttpConfig, LearningConfig
from loraplex_training.config import RECIPES
from tests.server.conftest import Front, make_front
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

TRAIN = "/v1/adapters/train"
PAIRS = [{"prompt": f"word {i}", "answer": "AB"} for i in range(24)]
CHATS = [
    {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": "AB"}]}
    for p in PAIRS
]
# What a process that trains may do.
WAITS = "input()"
DIES = "import sys; sys.exit('out of memory at /home/secret')"
REFUSES = """print('{"error": "data.jsonl, example 1 has 2000 tokens", "param": "examples"}')"""


MakeFront = Callable[..., Front]


@pytest.fixture
def front_with(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[MakeFront]:
    """A server whose trainings are done by a Python program of the test's."""
    made: list[Front] = []

    def make(program: str, http: HttpConfig | None = None) -> Front:
        pools = WorkerPools()
        jobs = Jobs(pools.jobs)
        front = make_front(
            tokenizer,
            base_spec,
            tmp_path,
            http,
            with_store=lambda store: {
                "training": Training(
                    store,
                    jobs,
                    pools.changes,
                    base=tmp_path / "secret-base",
                    base_name="tiny",
                    n_threads=1,
                    max_budget_s=60.0,
                    max_rank=16,
                    command=(sys.executable, "-c", program),
                )
            },
            jobs=jobs,
            pools=pools,
        )
        made.append(front)
        return front

    yield make
    for front in made:
        front.app.state.parts.makers.training.close()
        front.close()


@pytest.fixture
def waiting(front_with: MakeFront) -> Front:
    """Its trainings go on until they are stopped."""
    return front_with(WAITS)


async def _ended(front: Front, started: httpx.Response) -> dict[str, Any]:
    assert started.status_code == 202, started.text
    job = started.json()
    assert started.headers["location"] == f"/v1/jobs/{job['id']}"
    last = (await front.client.get(f"/v1/jobs/{job['id']}/events")).text.split("\n\n")
    states = [line.removeprefix("data: ") for line in last if line.startswith("data: {")]
    ended: dict[str, Any] = json.loads(states[-1])
    return ended


@pytest.mark.anyio
async def test_a_server_that_was_not_started_for_it_trains_nothing(front: Front) -> None:
    answer = await front.post(TRAIN, {"name": "x", "examples": PAIRS})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "feature_not_enabled"
    assert "--allow-training" in error["message"]
    assert (await front.client.get("/version")).json()["features"]["train"] is False


@pytest.mark.anyio
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
        ({"budget_s": 61}, 400, "budget_s"),
        ({"lr": 0}, 400, "lr"),
        ({"epochs": 3}, 400, "epochs"),
    ],
)
async def test_what_cannot_be_trained_is_refused_and_names_the_field(
    waiting: Front, change: dict[str, Any], status: int, param: str
) -> None:
    answer = await waiting.post(TRAIN, {"name": "x", "examples": PAIRS, **change})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"].startswith(param)
    assert waiting.app.state.parts.makers.training._processes == {}


@pytest.mark.anyio
async def test_one_is_trained_at_a_time_and_a_cancelled_one_leaves_nothing(waiting: Front) -> None:
    started = await waiting.post(TRAIN, {"name": "x", "examples": CHATS})
    queued = [await waiting.post(TRAIN, {"name": f"y{n}", "examples": PAIRS}) for n in range(3)]
    assert [(each.status_code, each.json()["stage"]) for each in queued] == [(202, "queued")] * 3
    busy = await waiting.post(TRAIN, {"name": "z", "examples": PAIRS})
    assert (busy.status_code, busy.json()["error"]["code"]) == (429, "too_many_training_jobs")
    assert int(busy.headers["retry-after"]) >= 1
    job = started.json()
    assert job["training"]["n_examples"] == len(CHATS)
    cancelled = await waiting.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert cancelled.status_code == 200
    assert (await _ended(waiting, started))["status"] == "cancelled"
    assert (await waiting.client.get("/v1/adapters/x")).status_code == 404
    for each in queued:
        await waiting.client.post(f"/v1/jobs/{each.json()['id']}/cancel")
        assert (await _ended(waiting, each))["status"] == "cancelled"
    assert list((waiting.store.root / "staging").glob("*")) == []
    again = await waiting.post(TRAIN, {"name": "x", "examples": PAIRS})
    assert again.status_code == 202


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("program", "told"), [(DIES, "the server's log says why"), (REFUSES, "2000 tokens")]
)
async def test_a_training_that_fails_says_so_and_changes_nothing(
    front_with: MakeFront, caplog: pytest.LogCaptureFixture, program: str, told: str
) -> None:
    front = front_with(program)
    job = await _ended(front, await front.post(TRAIN, {"name": "x", "examples": PAIRS}))
    assert job["status"] == "failed"
    assert job["error"]["code"] == "training_failed"
    assert told in job["error"]["message"]
    assert "secret" not in json.dumps(job)
    if program is DIES:
        assert "out of memory at /home/secret" in caplog.text
    assert (await front.client.get("/v1/adapters")).json()["data"] == []


@pytest.mark.anyio
async def test_a_key_that_may_only_ask_trains_nothing(front_with: MakeFront) -> None:
    key = "a-key-that-asks"
    http = HttpConfig(api_keys=(ApiKey.of(key, Scope.INFER),))
    front = front_with(WAITS, http)
    front.headers["authorization"] = f"Bearer {key}"
    answer = await front.post(TRAIN, {"name": "x", "examples": PAIRS})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")


def test_training_without_cores_for_it_stops_the_start() -> None:
    with pytest.raises(ValueError, match="learning-threads"):
        LearningConfig(allow_training=True, threads=0)


# From here on a real server of a tiny base, and real training.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    state = tmp_path_factory.mktemp("state")
    with server_process(tiny, state, "--allow-training", "--max-learning-time", "300") as running:
        yield running


def _events(server: ServerProcess, job: str) -> Iterator[dict[str, Any]]:
    with httpx.stream("GET", f"{server.url}/v1/jobs/{job}/events", timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def _order(server: ServerProcess, **fields: object) -> str:
    body = {"name": "ab", "examples": PAIRS, "rank": 4, "lr": 0.02, "steps": 40, **fields}
    answer = httpx.post(server.url + TRAIN, json=body, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.mark.slow
def test_a_running_training_is_cancelled_within_a_step(served: ServerProcess) -> None:
    job = _order(served, name="never", steps=10_000)
    last: dict[str, Any] = {}
    for last in _events(served, job):
        if last["training"]["step"] > 0 and last["status"] == "running":
            httpx.post(f"{served.url}/v1/jobs/{job}/cancel", timeout=60)
    assert last["status"] == "cancelled"
    assert httpx.get(f"{served.url}/v1/adapters/never", timeout=60).status_code == 404


@pytest.mark.slow
def test_what_was_trained_is_served_and_peft_finds_it_better_than_the_base(
    served: ServerProcess, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    states = list(_events(served, _order(served, description="Says AB.")))
    steps = [state["training"] for state in states if state["training"]["step"]]
    assert states[-1]["status"] == "succeeded", states[-1]
    assert steps[-1]["step"] == 40
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["validation_loss"] < steps[-1]["base_validation_loss"]

    card = httpx.get(f"{served.url}/v1/adapters/ab", timeout=60).json()
    assert card["digest"] == states[-1]["digest"]
    assert (card["description"], card["ranks"]) == ("Says AB.", [4])
    assert card["provenance"]["training"]["n_examples"] == 22  # two are held out
    files = files_of(card["digest"], tmp_path_factory.getbasetemp())
    base = AutoModelForCausalLM.from_pretrained(tiny)
    alone = _losses(base, tiny)
    trained = PeftModel.from_pretrained(base, files)
    learnt = _losses(trained, tiny)
    assert sum(learnt) < 0.8 * sum(alone)
    asked = httpx.post(
        f"{served.url}/v1/chat/completions",
        json={
            "messages": [{"role": "user", "content": "word 77"}],
            "adapter": "ab",
            "temperature": 0,
            "max_tokens": 2,
            "return_token_ids": True,
        },
        timeout=60,
    ).json()
    assert asked["choices"][0]["token_ids"] == greedy(trained, tiny, "word 77", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=[] if recipe in ("lora-ga", "sora") else pytest.mark.nightly)
        for recipe in sorted(RECIPES)
    ],
)
def test_every_recipe_trains_and_is_served_as_peft_reads_it(
    served: ServerProcess, tiny: Path, tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    name = f"by-{recipe}"
    order = _order(served, name=name, recipe=recipe, steps=6, examples=PAIRS[:8])
    *_, last = _events(served, order)
    assert last["status"] == "succeeded", last
    card = httpx.get(f"{served.url}/v1/adapters/{name}", timeout=60).json()
    assert card["provenance"]["training"]["shape"]["recipe"] == recipe
    assert max(card["ranks"]) <= 4 * RECIPES[recipe]
    files = files_of(card["digest"], tmp_path_factory.getbasetemp())
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), files)
    body = {
        "messages": [{"role": "user", "content": "word 77"}],
        "adapter": name,
        "temperature": 0,
        "max_tokens": 4,
        "return_token_ids": True,
    }
    asked = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    assert asked["choices"][0]["token_ids"] == greedy(trained, tiny, "word 77", 4)


@pytest.mark.slow
def test_a_budget_bounds_a_training_on_many_examples(served: ServerProcess) -> None:
    long = [{"prompt": f"word {i} " * 40, "answer": "AB"} for i in range(600)]
    states = list(_events(served, _order(served, name="many", examples=long, budget_s=20)))
    assert states[-1]["status"] == "succeeded", states[-1]
    told = httpx.get(f"{served.url}/v1/adapters/many", timeout=60).json()["provenance"]["training"]
    assert told["seconds"] < 20
    assert told["n_examples"] + told["n_validation"] == 600
    assert told["n_validation"] < 60
    assert told["validation_loss"] is not None

    states = list(_events(served, _order(served, name="none", examples=long, budget_s=0.001)))
    assert states[-1]["status"] == "failed"
    assert "before the first step" in states[-1]["error"]["message"]
    assert "raise budget_s" in states[-1]["error"]["message"]


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
    head = _prompt(folder, prompt)
    made = model.generate(
        input_ids=head,
        attention_mask=torch.ones_like(head),
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = made[0, head.shape[1] :].tolist()
    return tokens
