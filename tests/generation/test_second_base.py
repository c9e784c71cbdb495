"""Another base than the shipped generator's, of another architecture: zoo, generator, server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loraplex_generation.experts import ExpertRecipe
from loraplex_generation.joint import JointRecipe
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.service import Generator
from loraplex_generation.sg_lora import SgRecipe
from loraplex_generation.training import train_bundle
from loraplex_generation.zoo.split import ZooSplit
from loraplex_generation.zoo.tasks import Task
from loraplex_generation.zoo_training import ZooTraining
from loraplex_server.cli.app import app
from tests.support.server_process import failing_start, server_process
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tiny_zoo import tiny_qwen2_directory

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

TRAIN = ("past/plain", "plural/plain", "past/quotes", "plural/quotes")
PROMPT = "walk"


class SecondBase(NamedTuple):
    directory: Path
    library: Path
    generator: Generator


@pytest.fixture(scope="module")
def second(pulled_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> SecondBase:
    folder = tmp_path_factory.mktemp("second")
    directory = tiny_qwen2_directory(folder / "base", spread=0.3)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    encoder = SentenceEncoder(pulled_encoder)
    zoo = ZooTraining(
        folder / "zoo",
        folder / "library",
        joint=JointRecipe(n_steps=40, tasks_per_step=2, tokens_per_task=60, lr=5e-2, warmup=2),
        expert=ExpertRecipe(max_steps=2, chunk=1, tokens_per_task=60, validation_rows=4),
        split=ZooSplit(sets={"train": TRAIN, "validation": ()}, digests={}),
    )
    stages = ("joint", "experts")
    zoo.run(directory, encoder, tokenizer, report=lambda line: None, stages=stages)
    library = zoo.export(directory, encoder, tokenizer, report=lambda line: None).parent
    train_bundle(library, encoder, sg=SgRecipe(n_steps=2, hidden=8, latent=2)).save(library)
    generator = Generator.load(library, encoder, base_name="base", base_directory=directory)
    return SecondBase(directory, library, generator)


@pytest.fixture(scope="module")
def client(second: SecondBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    state = tmp_path_factory.mktemp("state")
    with (
        server_process(second.directory, state, "--generator-dir", second.library) as server,
        httpx.Client(base_url=server.url, timeout=600) as http,
    ):
        yield http


def reply(client: httpx.Client, adapter: str | None, prompt: str = PROMPT) -> str:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 12,
        **({"adapter": adapter} if adapter else {}),
    }
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


def test_a_sentence_becomes_the_adapter_that_peft_applies_to_this_base(
    second: SecondBase, client: httpx.Client, tmp_path: Path
) -> None:
    sentence = Task.parse("past/quotes").descriptions()[0]
    order = {"description": sentence, "name": "made", "probe": False, "force": True}
    assert client.post("/v1/adapters/generate", json=order).status_code == 201
    made = second.generator.generate(sentence, force=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(made.config))
    save_file(made.tensors, tmp_path / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(second.directory, dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(model, tmp_path)
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out = adapted.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )
    theirs = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert reply(client, "made") == theirs
    assert reply(client, None) != theirs


def test_examples_are_learnt_on_the_weights_that_serve_this_base(client: httpx.Client) -> None:
    """A random base learns little in the steps of a job: one mark that its library is close to."""
    words = ("red", "blue", "green", "plum", "gold", "grey", "pink", "teal")
    order = {
        "description": "the past tense of the verb",
        "name": "learnt",
        "examples": [{"prompt": word, "answer": '"'} for word in words],
        "budget_s": 120,
        "wait": True,
        "force": True,
        "probe": False,
    }
    answer = client.post("/v1/adapters/generate", json=order)
    assert answer.status_code == 201, answer.text
    told = answer.json()["provenance"]["refinement"]
    assert told["gained"]
    assert told["held_out"]["after"]["nll"] < told["held_out"]["before"]["nll"]
    assert told["held_out"]["turns"]["of"] == told["held_out"]["after"]["of"]
    assert reply(client, "learnt", "navy") == '"' != reply(client, None, "navy")


def test_the_command_learns_on_a_server_from_a_file_of_pairs(
    client: httpx.Client, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    words = ("red", "blue", "green", "plum", "gold", "grey", "pink", "teal")
    lines = [json.dumps({"prompt": word, "answer": '"'}) for word in words]
    pairs.write_text("\n".join(lines))
    order = ["generate", "the past tense of the verb", "--examples", str(pairs), "--force"]
    server = ["--server", str(client.base_url), "--name", "told", "--budget", "120"]
    result = CliRunner().invoke(app, [*order, *server, "--prompt", "navy"])
    assert result.exit_code == 0, result.output
    assert "registered as told" in result.output
    assert 'navy  →  "\n' in result.output
    card = client.get("/v1/adapters/told").raise_for_status().json()
    told = card["provenance"]["refinement"]
    assert told["gained"]
    shown = " ".join(result.output.split())
    assert f"of {told['held_out']['before']['of']} held out" in shown
    turns = told["held_out"]["turns"]
    assert f"{turns['exact']} of {turns['of']} exact, nll {turns['nll']:.2f}" in shown
    assert reply(client, "told", "navy") == '"' != reply(client, None, "navy")

    pairs.write_text('{"prompt": "red"}\n')
    refused = CliRunner().invoke(app, [*order, *server])
    assert refused.exit_code == 1
    assert "line 1" in refused.output


def test_a_generator_that_is_nowhere_stops_the_start(second: SecondBase, tmp_path: Path) -> None:
    status, log = failing_start(
        "--model", second.directory, "--generator-dir", tmp_path / "nowhere", "--port", "0"
    )
    assert status != 0
    assert "generator" in log
    assert "nowhere" in log
