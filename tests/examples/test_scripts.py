"""Each script of `examples/` does what it says, against a real server with the default base."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from num2words import num2words
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DEMOS = ROOT / "adapter_store" / "loraplex_adapter_store" / "demos"
FLAGS = ("--demos", "--kv-memory", "384MiB", "--adapter-memory", "128MiB")
KEYS = {"ACME_KEY": "sk-acme", "UMBRA_KEY": "sk-umbra"}


@pytest.fixture(scope="module")
def server(pulled_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Yield a server with keys of two tenants and of the operator."""
    folder = tmp_path_factory.mktemp("examples")
    keys = folder / "keys.toml"
    keys.write_text(
        "".join(
            f'[[key]]\nname = "{name}"\nscope = "admin"\ntenant = "{name}"\n'
            f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
            for name, key in (("acme", "sk-acme"), ("umbra", "sk-umbra"))
        )
    )
    flags = (*FLAGS, "--keys", keys, "--api-key", "sk-operator")
    with server_process(pulled_base, folder / "state", *flags) as running:
        yield running


def run(server: ServerProcess, folder: Path, script: str, *arguments: str, **keys: str) -> str:
    """Run a script and return its output."""
    environment = {**os.environ, "LORAPLEX_URL": server.url, "LORAPLEX_API_KEY": "sk-operator"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env={**environment, **keys},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answer_of(server: ServerProcess, text: str, key: str, **fields: object) -> str:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120
    )
    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


def test_every_script_is_tested() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    source = Path(__file__).read_text()
    elsewhere = {"trl_grpo.py"}  # tests/clients, where TRL is installed
    assert {name for name in scripts if f'"{name}"' in source} == scripts
    clients = (ROOT / "tests/clients/test_trl.py").read_text()
    assert all(f'"{name}"' in clients for name in elsewhere)
    page = (ROOT / "docs/examples.md").read_text()
    assert set(re.findall(r"\((?:\.\./examples/)(\w+\.py)\)", page)) == scripts


def test_openai_client(server: ServerProcess, tmp_path: Path) -> None:
    printed = run(server, tmp_path, "openai_client.py")
    hello = answer_of(server, "Hello! Who are you?", "sk-operator", adapter="pirate", max_tokens=48)
    assert f"streamed, through pirate:\n{hello}\n" in printed
    assert f"one adapter: {num2words(437, lang='de')}\n" in printed
    assert "auto: ada@example.org\n" in printed
    person = {"name": "Ada", "age": 36, "city": "London", "job": "writer"}
    assert f"a schema: {person}\n" in printed


def test_langchain_chat(server: ServerProcess, tmp_path: Path) -> None:
    printed = run(server, tmp_path, "langchain_chat.py").rstrip("\n")
    reviews = ["The soup was cold and the waiter rude.", "What a lovely evening, thank you!"]
    asked = [("sentiment", review) for review in reviews]
    asked.append(("pirate", f"Answer this review: {reviews[0]}"))
    told = [
        answer_of(server, text, "sk-operator", adapter=name, max_tokens=48) for name, text in asked
    ]
    assert printed == f"{told[0]}: {reviews[0]}\n{told[1]}: {reviews[1]}\n{told[2]}"


def test_batch(server: ServerProcess, tmp_path: Path) -> None:
    printed = run(server, tmp_path, "batch.py", "german-numbers", "358", "437", "81")
    assert printed.splitlines() == [
        "completed 3 answers",
        *(f"{number}: {num2words(number, lang='de')}" for number in (358, 437, 81)),
    ]


def test_tenants_rag(server: ServerProcess, pulled_encoder: Path, tmp_path: Path) -> None:
    question = "When do you open?"
    folders = (f"acme={DEMOS / 'pirate'}", f"umbra={DEMOS / 'emoji'}")
    printed = run(server, tmp_path, "tenants_rag.py", *folders, question, **KEYS)
    blocks = re.findall(
        r"(\w+): adapters (.*); support is (\w+)\n  found:  (.*)\n  answer: (.*)", printed
    )
    assert [block[0] for block in blocks] == ["acme", "umbra"]
    assert [block[3] for block in blocks] == [
        "The shop opens at nine in the morning and closes at six.",
        "The museum opens at noon, and is closed on Mondays.",
    ]
    assert blocks[0][2] != blocks[1][2]
    for (tenant, names, _, found, answer), key, demo in zip(
        blocks, KEYS.values(), ("pirate", "emoji"), strict=True
    ):
        assert "support" in names.split(", "), tenant
        # the demo that the operator shares has the same weights
        same = answer_of(
            server, f"{found}\n\nQuestion: {question}", key, adapter=demo, max_tokens=48
        )
        assert same.startswith(answer)


@pytest.mark.nightly
def test_encoder_classifiers(pulled_encoder: Path, tmp_path: Path) -> None:
    """Two classifiers of one encoder learn their tasks from twelve texts each."""
    with server_process(pulled_encoder, tmp_path / "state", "--api-key", "sk-operator") as server:
        printed = run(server, tmp_path, "encoder_classifiers.py", str(pulled_encoder))
        cards = httpx.get(
            f"{server.url}/v1/adapters", headers={"Authorization": "Bearer sk-operator"}
        ).json()
    assert "request" in str(cards)
    shares = re.findall(r"(\w+): (\d+)% of 4 texts right, 2 labels", printed)
    assert [name for name, _ in shares] == ["topic", "request"]
    assert sum(int(share) for _, share in shares) >= 150, printed  # a guess would be 100


@pytest.mark.nightly
def test_rl_loop(tmp_path: Path) -> None:
    """The loop takes the same steps on a tiny base, in seconds."""
    tiny = save_tiny_model(tmp_path / "tiny")
    with server_process(tiny, tmp_path / "state", "--api-key", "sk-operator") as server:
        assert_policy_is_served(server, tiny, tmp_path)


@pytest.mark.nightly
def test_rl_loop_on_the_default_base(
    server: ServerProcess, pulled_base: Path, tmp_path: Path
) -> None:
    assert_policy_is_served(server, pulled_base, tmp_path)


def assert_policy_is_served(server: ServerProcess, base: Path, folder: Path) -> None:
    """The script moves the weights twice; the last ones answer as PEFT says."""
    arguments = ("--steps", "2", "--out", "policy", "--base", str(base))
    printed = run(server, folder, "rl_loop.py", *arguments)
    etags = re.findall(r"step \d: mean reward \d\.\d+, policy is (\S+)", printed)
    assert len(set(etags)) == 2
    moved = load_file(folder / "policy" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in moved.items() if "lora_B" in name)
    text = "Tell me about cats."
    served = answer_of(server, text, "sk-operator", adapter="policy", max_tokens=24)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "policy"
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    prompt = ids["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=24)
    assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True) == served
