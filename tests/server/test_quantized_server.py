"""A real server with --quantization: what it says of itself, and what it refuses."""

import json
from pathlib import Path

import httpx
import pytest

from tests.conformance.oracle import save_short_base
from tests.support.servers.server_process import failing_start, save_tiny_model, server_process

pytestmark = pytest.mark.slow
_INT8 = ("--quantization", "int8")


def test_a_quantised_default_base_chats(pulled_base: Path, tmp_path: Path) -> None:
    flags = (*_INT8, "--dtype", "bfloat16", "--kv-memory", "64MiB")
    with (
        server_process(pulled_base, tmp_path / "state", *flags) as server,
        httpx.Client(base_url=server.url, timeout=300) as client,
    ):
        (base,) = [m for m in client.get("/v1/models").json()["data"] if "quantization" in m]
        assert base["quantization"] == "int8"
        assert "Paris" in _answer(client, base["id"], "What is the capital of France?")
    assert "with int8 linears" in server.log
    assert "MiB in int8, they were" in server.log


@pytest.fixture
def short_base(pulled_base: Path, tmp_path: Path) -> Path:
    return save_short_base(pulled_base, tmp_path / "base", n_layers=4, n_tokens=49152)


@pytest.mark.parametrize(
    "base", ["short_base", pytest.param("pulled_base", marks=pytest.mark.nightly)]
)
def test_a_quantised_base_learns_from_examples(
    request: pytest.FixtureRequest, base: str, tmp_path: Path
) -> None:
    model = request.getfixturevalue(base)
    flags = (*_INT8, "--dtype", "bfloat16", "--adapter-memory", "64MiB")
    with (
        server_process(model, tmp_path / "state", *flags) as server,
        httpx.Client(base_url=server.url, timeout=300) as client,
    ):
        pairs = [{"prompt": f"number {i}", "answer": "Yes, captain."} for i in range(6)]
        order = {"description": "Talk like a sailor.", "examples": pairs, "name": "sailor"}
        made = client.post(
            "/v1/adapters/generate", json={**order, "budget_s": 240, "wait": True, "probe": False}
        )
        assert made.status_code == 201, made.text
        held_out = made.json()["provenance"]["refinement"]["held_out"]
        assert held_out["after"]["nll"] < 0.5 * held_out["base"]["nll"]
        assert _answer(client, "sailor", "number 9") == "Yes, captain."


def _answer(client: httpx.Client, model: str, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_checkpoint_of_a_form_that_is_not_read_does_not_start(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    status, said = failing_start("--model", base, "--state-dir", tmp_path / "state", "--port", "0")
    assert status == 1
    assert "'bitsandbytes', which is not one of" in " ".join(said.split())
    assert "Traceback" not in said
