"""The comparison of recipes trains each arm through a server, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.servers.server_process import save_tiny_model, server_process

ROOT = Path(__file__).resolve().parents[3]
SCORE = "METRICS = {'starts': lambda answer, right: float(answer[:1] == right[:1])}\n"


def _compare(folder: Path, url: str, *arms: str) -> str:
    command = [sys.executable, "-m", "research.recipes", "--url", url, "--data", str(folder)]
    command += ["--out", str(folder / "out" / "scores.json"), "--tasks", "letters", "numbers"]
    command += ["--budget", "3", "--rows", "4", "--pairs", "8", "--arms", *arms]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_arm_is_trained_once_and_stands_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "score.py").write_text(SCORE)
    for name, answer in (("letters", "AB"), ("numbers", "12")):
        pairs = [[f"word {i}", answer] for i in range(12)]
        task = {"name": name, "category": name, "metric": "starts", "descriptions": ["Say it."]}
        text = json.dumps({**task, "train": pairs[:8], "test": pairs[8:]})
        (tmp_path / f"{name}.json").write_text(text)
    model = save_tiny_model(tmp_path / "tiny")
    with server_process(model, tmp_path / "state", "--allow-training") as server:
        _compare(tmp_path, server.url, "lora")
        printed = _compare(tmp_path, server.url, "lora", "sora", "dora")
    results = json.loads((tmp_path / "out" / "scores.json").read_text())
    for task in ("letters", "numbers"):
        assert set(results["scores"][task]) == {"base", "lora", "sora", "dora"}
        assert min(results["steps"][task].values()) > 0
        assert f"{task}, lora" not in printed  # the first call has trained it
        assert f"{task}, sora" in printed
    assert results["failed"] == {}
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert {row.split(" | ")[0] for row in rows[2:]} == {"| base", "| lora", "| sora", "| dora"}
    assert results["means"]["lora"]["mean"] > results["means"]["base"]["mean"]
