"""The trainer of the multi-task adapter, on a tiny base and made-up tasks."""

import json
import lzma
from pathlib import Path

import pytest
from peft import PeftConfig
from safetensors.torch import load_file

from research.generation.multi_task import main
from tests.support.servers.server_process import save_tiny_model


def test_an_adapter_is_trained_and_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_model(tmp_path / "tiny")
    tasks = tmp_path / "tasks.jsonl.xz"
    with lzma.open(tasks, "wt") as file:
        for name in ("upper", "twice"):
            pairs = [["ab", "AB"], ["cd", "CD"], ["ef", "EF"]]
            record = {"name": name, "source": name, "descriptions": [name], "pairs": pairs}
            file.write(json.dumps(record) + "\n")
    main(tasks, tmp_path / "first", seconds=5, lr=1e-2, start=None, base=str(base))
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in capsys.readouterr().out.splitlines()
        if "loss" in line
    ]
    assert len(losses) > 1
    assert losses[-1] < losses[0]
    assert PeftConfig.from_pretrained(tmp_path / "first").r == 16
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    main(tasks, tmp_path / "more", seconds=1, lr=1e-6, start=tmp_path / "first", base=str(base))
    more = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert all(first[name].sub(more[name]).abs().max() < 0.01 for name in first)
