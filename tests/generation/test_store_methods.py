"""SG-LoRA and ICM-LoRA over HTTP, on adapters that PEFT trained for a random Qwen2."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loraplex_generation.experts.fitted import EXPERTS_FILE, FittedExperts
from loraplex_server.cli.app import app
from loraplex_server.model.loading.pull import DEFAULT_ENCODER
from tests.support.bases.tiny_generation import tiny_qwen2_directory
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.server_process import server_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TASKS = {  # description → the answer to every prompt
    "Name the colour of the sky": "blue",
    "Say what noise a cow makes": "moo",
    "Tell which fruit is yellow and long": "banana",
    "State the capital city of France": "Paris",
    "Give the number of days in a week": "seven",
}
PROMPTS = [f"question {i}" for i in range(8)]
TOKENIZER = tiny_tokenizer()


class Peft:
    """The base with every trained adapter, in PEFT."""

    def __init__(self, base: Path) -> None:
        torch.manual_seed(0)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        for i, answer in enumerate(TASKS.values()):
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
            if i == 0:
                self.model = peft.get_peft_model(self.model, config, f"task{i}")
            else:
                self.model.add_adapter(f"task{i}", config)
            self._train(f"task{i}", answer)

    def _train(self, name: str, answer: str) -> None:
        self.model.set_adapter(name)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=1e-2)
        ending = [*TOKENIZER(answer, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
        for step in range(60):
            ids = torch.tensor([[*_ids(f"question {step % 11}"), *ending]])
            logits = self.model(input_ids=ids).logits[0, -len(ending) - 1 : -1]
            optimiser.zero_grad()
            cross_entropy(logits, torch.tensor(ending)).backward()
            optimiser.step()

    @torch.no_grad()
    def reply(self, adapter: str, prompt: str) -> str:
        self.model.set_adapter(adapter)
        ids = torch.tensor([_ids(prompt)])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            eos_token_id=TOKENIZER.eos_token_id,
        )
        return TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _ids(prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return ids


class Served:
    """A server that holds the trained adapters, with their descriptions."""

    def __init__(self, http: httpx.Client, base: Path, state: Path, generators: Path) -> None:
        self.http, self.base, self.state, self.generators = http, base, state, generators

    def make(self, **order: Any) -> dict[str, Any]:
        body = {"probe": False, **order}
        made = self.http.post("/v1/adapters/generate", json=body)
        assert made.status_code == 201, made.text
        card: dict[str, Any] = made.json()
        return card

    def chat(self, adapter: object, prompt: str) -> dict[str, Any]:
        body = {
            "adapter": adapter,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 12,
        }
        answer = self.http.post("/v1/chat/completions", json=body).raise_for_status()
        reply: dict[str, Any] = answer.json()
        return reply

    def reply(self, adapter: object, prompt: str) -> str:
        return str(self.chat(adapter, prompt)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_qwen2_directory(tmp_path_factory.mktemp("base"), spread=0.3)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> Peft:
    return Peft(base)


@pytest.fixture(scope="module")
def served(
    base: Path,
    trained: Peft,
    pulled_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    adapters, generators = folder / "adapters", folder / "generators"
    generators.mkdir()
    trained.model.save_pretrained(adapters)
    for i, description in enumerate(TASKS):
        card = {"description": description, "examples": PROMPTS}
        (adapters / f"task{i}" / "card.json").write_text(json.dumps(card))
    flags = ("--adapters-dir", adapters, "--generator-dir", generators)
    with (
        server_process(base, folder / "state", *flags) as server,
        httpx.Client(base_url=server.url, timeout=300) as http,
    ):
        yield Served(http, base, folder / "state", generators)


def _alpha(served: Served, sentence: str) -> dict[str, float]:
    """Return softmax top-4 over the server's own embeddings, by adapter."""
    body = {"model": DEFAULT_ENCODER, "input": [sentence, *TASKS]}
    rows = served.http.post("/v1/embeddings", json=body).raise_for_status().json()["data"]
    vectors = torch.tensor([row["embedding"] for row in rows])
    top = (vectors[1:] @ vectors[0]).topk(4)
    weights = (top.values / 0.05).softmax(0).tolist()
    return {f"task{i}": w for i, w in zip(top.indices.tolist(), weights, strict=True)}


def test_the_mixture_is_the_one_that_peft_makes(served: Served, trained: Peft) -> None:
    sentence = "Name a colour or a fruit"
    alpha = _alpha(served, sentence)
    card = served.make(description=sentence, method="sg-lora", name="mixture", force=True)
    told = card["provenance"]
    assert told["method"] == "sg-lora mixture"
    assert told["parts"] == pytest.approx(alpha, abs=2e-3)
    trained.model.add_weighted_adapter([*told["parts"]], [*told["parts"].values()], "theirs", "cat")
    replies = [served.reply("mixture", prompt) for prompt in PROMPTS]
    assert replies == [trained.reply("theirs", prompt) for prompt in PROMPTS]
    assert replies != [trained.reply("task0", prompt) for prompt in PROMPTS]


def test_a_chat_says_that_a_mixture_answered(served: Served, trained: Peft) -> None:
    described = {"description": "Tell the colour of the sky", "method": "sg-lora"}
    answer = served.chat(described, "question 3")
    assert answer["adapter"]["chosen_by"]["method"] == "sg-lora mixture"
    assert answer["choices"][0]["message"]["content"] == trained.reply("task0", "question 3")
    refused = served.http.post(
        "/v1/adapters/generate",
        json={"description": "Refactor this Haskell parser", "method": "sg-lora"},
    )
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "description_out_of_distribution"
    assert len(refused.json()["error"]["nearest"]) == 3
    unfitted = {"description": "the sky", "method": "icm-lora"}
    assert (
        "loraplex generator train" in served.http.post("/v1/adapters/generate", json=unfitted).text
    )


def test_a_new_adapter_of_the_store_changes_the_mixture(served: Served) -> None:
    order = {"description": "Say the noise of a dog", "method": "sg-lora"}
    before = served.make(**order)
    assert served.make(**order)["digest"] == before["digest"]
    served.http.patch("/v1/adapters/task0", json={"description": "Say what noise a dog makes"})
    after = served.make(**order)
    assert max(after["provenance"]["parts"], key=after["provenance"]["parts"].get) == "task0"
    served.http.patch("/v1/adapters/task0", json={"description": next(iter(TASKS))})
    assert after["digest"] != before["digest"]


@pytest.fixture(scope="module")
def fitted(served: Served) -> FittedExperts:
    """Fit both methods beside the running server, which reads the file at its next request."""
    order = ["generator", "train", "--from-store", "--state-dir", str(served.state)]
    order += ["--base", str(served.base), "--out", str(served.generators), "--steps", "200"]
    result = CliRunner().invoke(app, order)
    assert result.exit_code == 0, result.output
    assert "5 adapters" in result.output
    return FittedExperts.load(served.generators / EXPERTS_FILE)


@pytest.mark.parametrize("method", ["sg-lora", "icm-lora"])
def test_a_generated_adapter_answers_its_task_as_the_trained_one_does(
    served: Served, trained: Peft, fitted: FittedExperts, method: str
) -> None:
    """From new words by SG-LoRA, and from new prompts by ICM-LoRA."""
    wordings = ["Tell the colour of the sky", "Say which noise cows make", "Which fruit is yellow?"]
    prompts = {}
    if method == "icm-lora":
        wordings, prompts = [*TASKS], {"prompts": [f"question {i}" for i in range(8, 16)]}
    same = []
    for i, wording in enumerate(wordings):
        card = served.make(description=wording, method=method, name=f"{method}-{i}", **prompts)
        assert card["provenance"]["method"] == method
        assert card["provenance"]["generator"] == fitted.digest
        for prompt in PROMPTS:
            same.append(served.reply(card["name"], prompt) == trained.reply(f"task{i}", prompt))
    assert sum(same) >= 0.9 * len(same), same


def test_draws_depend_on_the_seed_alone(served: Served, fitted: FittedExperts) -> None:
    order = {"description": "Tell the colour of the sky", "method": "sg-lora", "samples": 2}
    digests = [served.make(**order, seed=seed)["digest"] for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_folders_are_fitted_as_the_store_is(
    served: Served, fitted: FittedExperts, tmp_path: Path
) -> None:
    order = ["generator", "train", str(served.state.parent / "adapters"), "--method", "sg-lora"]
    order += ["--steps", "2"]
    result = CliRunner().invoke(app, [*order, "--base", str(served.base), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    again = FittedExperts.load(tmp_path / EXPERTS_FILE)
    assert (again.names, again.icm) == (fitted.names, None)
    torch.testing.assert_close(again.gram, fitted.gram)
    assert again.base_fingerprint == fitted.base_fingerprint


def test_nothing_to_fit_is_an_error_with_a_remedy(served: Served, tmp_path: Path) -> None:
    run = CliRunner().invoke
    nothing = run(app, ["generator", "train", "--out", str(tmp_path)])
    assert nothing.exit_code == 2
    assert "--from-store" in nothing.output
    order = [
        "generator",
        "train",
        str(tmp_path),
        "--base",
        str(served.base),
        "--out",
        str(tmp_path),
    ]
    empty = run(app, order)
    assert empty.exit_code == 1
    assert "no adapter can be an expert" in empty.output
