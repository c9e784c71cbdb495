"""vLLM's benchmark client, `vllm bench serve`, with the options of vLLM's page on its benchmarks.

The options are those of docs/benchmarking/cli.md in vLLM's repository ("Online Benchmark" and
"Custom Dataset"); address, model, data and numbers are ours. `--lora-modules` is in the
command's own `--help`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.clients.prompts import HELLO

CLIENT = "vllm"
_STORY = HELLO.replace("Hello, who are you?", "Tell me a story.")


def _bench(url: str, folder: Path, *options: str) -> Any:
    """Run the command to its end and return the result that it saves."""
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "bench", "serve"),
        *("--backend", "vllm", "--endpoint", "/v1/completions", "--base-url", url),
        *("--model", os.environ["LORAPLEX_CLIENTS_BASE"]),  # a folder: its tokenizer is read there
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(folder), "--result-filename", "result.json"),
        *options,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert result["failed"] == 0, result["errors"]
    return result


def test_random(url: str, tmp_path: Path) -> None:
    """`vllm bench serve --dataset-name random`: every request succeeds, all tokens are counted"""
    result = _bench(
        url,
        tmp_path,
        *("--dataset-name", "random", "--num-prompts", "6"),
        *("--random-input-len", "32", "--random-output-len", "8"),
        *("--served-model-name", "base", "--ignore-eos"),
    )
    assert result["completed"] == 6
    assert result["output_lens"] == [8] * 6
    assert result["total_input_tokens"] == 6 * 32


def test_lora_modules(url: str, tmp_path: Path, complete: Callable[[str, str], str]) -> None:
    """`vllm bench serve --lora-modules … --lora-assignment round-robin`: each adapter's own text"""
    prompts = [HELLO, HELLO, _STORY, _STORY]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    result = _bench(
        url,
        tmp_path,
        *("--dataset-name", "custom", "--dataset-path", str(data)),
        *("--skip-chat-template", "--disable-shuffle", "--num-prompts", str(len(prompts))),
        *("--custom-output-len", "40", "--temperature=0", "--max-concurrency", "2"),
        *("--lora-modules", "pirate", "sql", "--lora-assignment", "round-robin"),
    )
    assert result["completed"] == len(prompts)
    adapters = ("pirate", "sql") * 2
    assert result["generated_texts"] == [
        complete(adapter, text) for adapter, text in zip(adapters, prompts, strict=True)
    ]
    assert all(tokens > 1 for tokens in result["output_lens"])
