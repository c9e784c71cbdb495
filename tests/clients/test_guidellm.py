"""guidellm, the benchmark client that vLLM recommends: `guidellm run` as in guidellm's README."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLIENT = "guidellm"


def _run(folder: Path, *options: str) -> Any:
    """Run the command to its end and return the requests of its report's only benchmark."""
    report = folder / "benchmarks.json"
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", *options),
        *("--tokenizer", f"kind=huggingface_auto,model={os.environ['LORAPLEX_CLIENTS_BASE']}"),
        *("--output", f"kind=json,path={report}"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert benchmark["requests"]["errored"] == []
    assert benchmark["requests"]["incomplete"] == []
    return benchmark


def test_synthetic_data(url: str, tmp_path: Path) -> None:
    """`guidellm run` with synthetic data, an adapter as the model: every request succeeds"""
    benchmark = _run(
        tmp_path,
        *("--backend", f"kind=openai_http,target={url},model=pirate"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
    )
    assert benchmark["metrics"]["request_totals"]["successful"] == 4
    assert [request["output_tokens"] for request in benchmark["requests"]["successful"]] == [8] * 4


def test_texts_of_an_adapter(url: str, tmp_path: Path, ask: Callable[[str, str], str]) -> None:
    """`guidellm run` with a file of prompts: the texts are those of the adapter"""
    prompts = ["Hello!", "Who are you?"]
    data = tmp_path / "prompts.json"
    data.write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    greedy = {"max_tokens": 40, "extras": {"body": {"temperature": 0}}}
    backend = {"kind": "openai_http", "target": url, "model": "pirate", **greedy}
    benchmark = _run(
        tmp_path,
        *("--backend", json.dumps(backend)),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=2"),
        *("--data", f"kind=json_file,path={data}"),
    )
    texts = [request["output"] for request in benchmark["requests"]["successful"]]
    assert texts == [ask("pirate", prompt) for prompt in prompts]
