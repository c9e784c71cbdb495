"""Scenarios and locust against a real server of a tiny random model, in their own processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.admin import delete_adapter, upload_adapter
from loadtests.client import admin_client
from loadtests.neighbours import pushes
from loadtests.neighbours.interference import measure
from loadtests.random_adapters import write_lora
from loadtests.server_metrics import MetricsSampler
from loadtests.systems import BASE, Loraplex, Target, started
from tests.support.servers.server_process import save_tiny_model, server_process

ROOT = Path(__file__).resolve().parents[2]
KEY = "smoke-secret"
TINY = {"dtype": "float32", "threads": 1, "kv-memory": "8MiB", "adapter-memory": "8MiB"}
SHORT = """
summary = "Two adapters for two seconds."
[adapters]
lora = 2
[request]
prompt_chars = 60
max_tokens = 4
[[phase]]
label = "short"
users = 2
seconds = 2
warmup_s = 0
"""
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server with a key and two adapters."""
    work = tmp_path_factory.mktemp("work")
    flags = ("--served-model-name", BASE, "--max-loras", "16", "--api-key", KEY)
    with server_process(model, work / "state", *flags) as server:
        with admin_client(server.url, KEY) as client:
            for seed, name in enumerate("ab"):
                upload_adapter(client, name, write_lora(model, work / name, rank=2, seed=seed))
        yield Target(server.url, pid=server.process.pid, api_key=KEY)


def bench(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraplex_server.cli.app", "bench", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@pytest.mark.nightly
def test_a_scenario_ends_in_a_report_with_no_request_lost(model: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "once.toml"
    scenario.write_text(SCENARIO)
    done = bench(scenario, "--model", model, "--out", tmp_path, "--against", "vllm-cpu,nobody")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "once.json").read_text())
    closed, tiers, opened = result["systems"]["loraplex"]
    families = {"base", "lora", "mixlora", "block-lora", "churned", "generated"}
    assert set(closed["by_family"]) == families
    assert closed["lost"] == opened["lost"] == 0
    assert closed["churn"]["added"] > 0
    assert closed["churn"]["replaced"] > 0
    assert closed["churn"]["failed"] == 0, closed["churn"]
    assert closed["adapter_loads"] > 0
    assert len(closed["rss_mib"]) == 6
    assert min(closed["rss_mib"]) > 0
    assert opened["served"] > 5
    assert opened["ttft_s"]["p50"] > 0
    assert {"device", "host"} & set(tiers["tiers"])
    notes = " ".join(result["notes"])
    assert "skipping vllm-cpu: no vllm" in notes
    assert "skipping nobody: unknown baseline" in notes
    assert result["commit"]
    assert "| closed |" in (tmp_path / "once.md").read_text()
    assert (tmp_path / "once.png").read_bytes().startswith(b"\x89PNG")
    *table, paths = done.stdout.splitlines()
    assert max(map(len, table)) <= 80
    assert str(tmp_path / "once.md") in paths  # in one line, so that it can be copied


@pytest.mark.nightly
def test_a_baseline_that_does_not_start_loses_nothing_of_ours(model: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "short.toml"
    scenario.write_text(SHORT + "mix = { base = 1 }\n")  # vLLM could run that
    vllm = tmp_path / "venv/bin/vllm"
    vllm.parent.mkdir(parents=True)
    vllm.write_text("#!/bin/sh\necho no such option\nexit 2\n")
    vllm.chmod(0o755)
    venv = ("--vllm-venv", vllm.parents[1])
    done = bench(scenario, "--model", model, "--out", tmp_path, "--against", "vllm-cpu", *venv)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "short.json").read_text())
    assert set(result["systems"]) == {"loraplex"}
    note = next(note for note in result["notes"] if note.startswith("vllm-cpu: left out"))
    assert "no such option" in note


def test_a_running_server_is_asked_with_its_key_and_left_as_it_was(
    running: Target, model: Path, tmp_path: Path
) -> None:
    scenario = tmp_path / "short.toml"
    scenario.write_text(SHORT)
    page = tmp_path / "sent" / "page.html"
    flags = ("--url", running.url, "--model", model, "--out", tmp_path, "--page", page)
    done = bench(scenario, *flags, LORAPLEX_API_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '">short</text>' in page.read_text()
    result = json.loads((tmp_path / "short.json").read_text())
    (row,) = result["systems"]["loraplex"]
    assert row["served"] > 0
    assert row["adapter_loads"] >= 2  # known from /metrics, which is closed without the key
    assert result["notes"] == []
    with admin_client(running.url, KEY) as client:
        names = {card["name"] for card in client.get("/v1/adapters").json()["data"]}
    assert names == {"a", "b"}


@pytest.mark.nightly
def test_a_bench_that_is_terminated_removes_its_adapters(
    running: Target, model: Path, tmp_path: Path
) -> None:
    scenario = tmp_path / "long.toml"
    scenario.write_text(SHORT.replace("seconds = 2", "seconds = 600"))
    command = [sys.executable, "-m", "loraplex_server.cli.app", "bench", scenario]
    flags = ("--url", running.url, "--model", model, "--out", tmp_path, "--api-key", KEY)
    process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
    with admin_client(running.url, KEY) as client:
        sampler = MetricsSampler(client, None)
        while not sampler.samples or not sampler.samples[-1].values.get("running"):
            assert process.poll() is None
            time.sleep(0.1)
            sampler.sample("until the bench sends")
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        names = {card["name"] for card in client.get("/v1/adapters").json()["data"]}
    assert names == {"a", "b"}


@pytest.mark.nightly
def test_an_adapter_that_a_server_has_already_is_left_alone(
    running: Target, model: Path, tmp_path: Path
) -> None:
    scenario = tmp_path / "short.toml"
    scenario.write_text(SHORT)
    mine = write_lora(model, tmp_path / "a1", rank=4, seed=7)
    with admin_client(running.url, KEY) as client:
        before = client.get("/v1/adapters").json()["data"]
        upload_adapter(client, "a1", mine)
        card = client.get("/v1/adapters/a1").json()
        flags = ("--url", running.url, "--model", model, "--out", tmp_path)
        done = bench(scenario, *flags, LORAPLEX_API_KEY=KEY)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "the server has an adapter a1 already" in " ".join(done.stdout.split())
        assert client.get("/v1/adapters/a1").json()["digest"] == card["digest"]
        assert delete_adapter(client, "a1") == 200
        after = client.get("/v1/adapters").json()["data"]
    assert {card["name"] for card in after} == {card["name"] for card in before}


def test_metrics_that_cannot_be_read_are_no_silence(running: Target) -> None:
    with admin_client(running.url, "wrong") as client:
        sampler = MetricsSampler(client, None)
        sampler.sample("p")
    assert sampler.failure == "GET /metrics answered 401"
    assert sampler.samples[0].values == {}


def test_a_server_that_does_not_answer_is_an_error_in_one_line(model: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "short.toml"
    scenario.write_text(SHORT)
    done = bench(scenario, "--url", "http://127.0.0.1:9", "--model", model, "--out", tmp_path)
    assert done.returncode == 1
    assert "http://127.0.0.1:9 does not answer" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.nightly
def test_gaps_between_tokens_are_told_apart_by_what_happened_meanwhile(
    model: Path, tmp_path: Path
) -> None:
    adapters = [write_lora(model, tmp_path / f"a{n}", rank=2, seed=n) for n in range(6)]
    with started(Loraplex({**TINY, "max-loras": 3}), model, adapters, tmp_path) as target:
        found = measure(target.url, [path.name for path in adapters], n_loads=10, max_tokens=100)
    assert found["loads"] == 10
    for key in ("gap_ms_without_loads", "gap_ms_in_seconds_with_loads", "gap_ms_during_a_load"):
        gaps = found[key]
        assert isinstance(gaps, dict)
        assert gaps["n"] > 0
        assert gaps["p50"] > 0


@pytest.mark.nightly
def test_gaps_beside_pushed_weights_are_compared_with_gaps_alone(
    model: Path, tmp_path: Path
) -> None:
    folders = [write_lora(model, tmp_path / f"a{seed}", rank=2, seed=seed) for seed in range(4)]
    system = Loraplex({**TINY, "keys": pushes.write_keys(tmp_path / "keys.toml")})
    with started(system, model, [], tmp_path) as target:
        found = pushes.measure(target, folders, n_rounds=1, turn_s=5.0, max_tokens=100)
    assert found["pushes"] == 4
    for gaps in (found["gap_ms_alone"], found["gap_ms_beside_pushes"]):
        assert gaps["n"] > 100  # type: ignore[index]
    assert found["p99_ratio"] > 0  # type: ignore[operator]


def test_a_base_that_is_not_on_this_machine_is_an_error_in_one_line(tmp_path: Path) -> None:
    done = bench("mixed", "--model", "nothing", "--out", tmp_path)
    assert done.returncode == 1
    assert "loraplex pull nothing" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr


def locust(target: Target, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    return subprocess.run(
        [*command, "--host", target.url, "-u", "2", "-r", "2", "-t", "3s", "--json", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "LORAPLEX_API_KEY"},
    )


def test_the_locustfile_runs_on_locusts_own_terms(running: Target) -> None:
    done = locust(running, "--api-key", KEY, "--max-tokens", "4", "--base-share", "0.5")
    assert done.returncode == 0, done.stderr
    rows = {(row["method"], row["name"]): row for row in json.loads(done.stdout)}
    for family in ("base", "lora"):
        for kind in ("TTFT", "TPOT", "E2E"):
            assert rows[kind, family]["num_requests"] > 0
            assert rows[kind, family]["num_failures"] == 0


def test_locust_stops_at_once_when_the_server_refuses_the_key(running: Target) -> None:
    done = locust(running, "--api-key", "wrong")
    assert done.returncode == 1
    assert "401 Unauthorized" in done.stderr


def test_outside_a_checkout_bench_says_so(tmp_path: Path) -> None:
    """An installed package has no folder of scenarios."""
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
    done = bench("list")
    assert done.returncode == 0
    for name in ("mixed", "adapters", "overload"):
        assert name in done.stdout
