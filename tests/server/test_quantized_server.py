"""A real server with --quantization: what it says of itself, and what it refuses."""

import json
from pathlib import Path

import httpx
import pytest

from tests.support.servers.server_process import failing_start, save_tiny_model, server_process

pytestmark = pytest.mark.slow


def test_a_quantised_default_base_chats_and_learns_from_examples(
    pulled_base: Path, tmp_path: Path
) -> None:
    flags = ("--quantization", "int8", "--dtype", "bfloat16", "--kv-memory", "64MiB")
    flags += ("--adapter-memory", "64MiB")
    with (
        server_process(pulled_base, tmp_path / "state", *flags) as server,
        httpx.Client(base_url=server.url, timeout=300) as client,
    ):
        (base,) = [m for m in client.get("/v1/models").json()["data"] if "quantization" in m]
        assert base["quantization"] == "int8"
        body = {
            "model": base["id"],
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        answer = client.post("/v1/chat/completions", json=body)
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]
        pairs = [{"prompt": f"number {i}", "answer": "Yes, captain."} for i in range(6)]
        order = {"description": "Talk like a sailor.", "examples": pairs, "name": "sailor"}
        made = client.post(
            "/v1/adapters/generate", json={**order, "budget_s": 240, "wait": True, "probe": False}
        )
        assert made.status_code == 201, made.text
        held_out = made.json()["provenance"]["refinement"]["held_out"]
        assert held_out["after"]["nll"] < 0.5 * held_out["base"]["nll"]
        asked = {**body, "model": "sailor", "messages": [{"role": "user", "content": "number 9"}]}
        answer = client.post("/v1/chat/completions", json=asked)
        assert answer.json()["choices"][0]["message"]["content"] == "Yes, captain."
    assert "with int8 linears" in server.log
    assert "MiB in int8, they were" in server.log


def test_a_checkpoint_of_a_form_that_is_not_read_does_not_start(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    status, said = failing_start("--model", base, "--state-dir", tmp_path / "state", "--port", "0")
    assert status == 1
    assert "'bitsandbytes', which is not one of" in " ".join(said.split())
    assert "Traceback" not in said
