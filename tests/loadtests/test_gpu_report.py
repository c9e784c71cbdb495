"""The report of a GPU, made of recorded numbers of a device that does not exist."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from kernels.benchmarks import bench_gpu
from loadtests.client import Outcome
from loadtests.gpu_report import sections
from loadtests.gpu_report.__main__ import NO_DEVICE, main
from loadtests.gpu_report.process import run_until
from loadtests.gpu_report.report import Report, Skipped, done_before, run_sections
from loadtests.gpu_report.sections import (
    SECTIONS,
    Plan,
    device_test_files,
    roofline_shares,
    sections_of,
    test_counts,
)
from loadtests.gpu_report.serving import (
    SMALL_LOAD,
    Load,
    ask_all,
    compare_serving,
    serving_numbers,
)
from loadtests.systems import Loraplex

MADE_UP = {"name": "Made-up GPU <no such device>", "memory MiB": 81559}


def cell(
    rows: int, system: str, us: float, percent: float, *, same: bool = True
) -> dict[str, object]:
    point = {"module": "made-up qkv", "n_rows": rows, "n_adapters": 1, "ranks": "8", "mapping": "x"}
    return {
        "point": point,
        "system": system,
        "microseconds": us,
        "roofline_percent": percent,
        "largest_error": 0.001 * us,
        "repeats_bitwise": same,
    }


CELLS = [
    *(cell(1, "loraplex", us, 60.0 + us) for us in (10.0, 14.0, 30.0)),
    cell(1, "vllm", 20.0, 40.0, same=False),
    cell(16, "loraplex", 50.0, 90.0),
]
JUNIT = """<testsuites><testsuite name="pytest" tests="3" skipped="1" failures="1" errors="0">
<testcase classname="tests.made_up" name="passes"/>
<testcase classname="tests.made_up" name="fails"><failure message="x">x</failure></testcase>
<testcase classname="tests.made_up" name="skips"><skipped/></testcase>
</testsuite></testsuites>"""


def new_report() -> Report:
    return Report(MADE_UP, {"torch": "9.9", "vllm": None}, "abc1234", "2026-01-01T00:00:00+00:00")


def test_without_a_device_one_sentence_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main([]) == 0
    assert capsys.readouterr().out == NO_DEVICE + "\n"


@pytest.mark.nightly
def test_it_is_started_as_a_module(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.gpu_report", f"--out={tmp_path / 'out'}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == NO_DEVICE + "\n"
    assert not (tmp_path / "out").exists()
    assert "loadtests.gpu_report" in (root / "Makefile").read_text()


def test_kernels_stand_beside_their_roofline() -> None:
    found = roofline_shares(CELLS)
    assert found["ours repeat bitwise"] == "4 of 4"
    first, second, third = found["rows"]
    assert (first["system"], first["µs"], first["% of roofline"]) == ("loraplex", 14.0, 74.0)
    assert first["largest error"] == pytest.approx(0.03)
    assert (second["system"], second["µs"]) == ("vllm", 20.0)
    assert (third["rows"], third["µs"]) == (16, 50.0)
    uneven = roofline_shares([cell(1, "loraplex", 1.0, 1.0, same=False)])
    assert uneven["ours repeat bitwise"] == "0 of 1"


def test_serving_counts_what_was_answered_whole() -> None:
    whole = [Outcome(0.0, 200, None, ttft, [0.01, 0.03], 1.0, 100) for ttft in (0.1, 0.2, 0.9)]
    broken = [Outcome(0.0, 200, None, 0.1, [], 1.0, 50, error="cut"), Outcome(0.0, 503)]
    numbers = serving_numbers([*whole, *broken], 2.0)
    assert (numbers["answered"], numbers["lost"]) == (3, 2)
    assert numbers["tokens/s"] == 150.0
    assert (numbers["TTFT ms"], numbers["TPOT ms"]) == (pytest.approx(200), pytest.approx(20))
    assert serving_numbers(broken, 1.0)["answered"] == 0


def test_nothing_is_asked_or_started_after_the_end_of_the_hour(tmp_path: Path) -> None:
    over = time.monotonic() - 1
    nobody = "http://127.0.0.1:9"  # an answer, or an error, would be an outcome
    assert ask_all(nobody, Loraplex(), [None], SMALL_LOAD, 3, over) == []
    assert len(ask_all(nobody, Loraplex(), [None], SMALL_LOAD, 3, over + 60)) == 3
    kept = tmp_path / "serving.json"
    (result,) = compare_serving(
        tmp_path, kept=kept, model=tmp_path, load=SMALL_LOAD, dtype=None, deadline=over
    )
    assert result["rows"] == []
    assert result["without 2 adapters"] == "the time was over"


def test_failed_tests_are_named() -> None:
    found = test_counts(JUNIT)
    assert (found["tests"], found["skipped"], found["failures"]) == (3, 1, 1)
    assert found["failed"] == [{"failed": "tests.made_up.fails"}]


def test_cells_and_rows_of_an_earlier_run_are_not_measured_again(tmp_path: Path) -> None:
    point = bench_gpu.Point("Llama-3.1-8B o", 16, 16, "8", "zipf")
    cell = bench_gpu.Measurement(point, "loraplex", 10.0, 60.0, 0.001, repeats_bitwise=True)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"cells": [asdict(cell)]}))
    assert bench_gpu._measured_before(file) == [cell]
    assert bench_gpu._measured_before(tmp_path / "none.json") == []
    assert next(bench_gpu.grid(quick=True)).module.startswith("Llama-3.1-8B")
    kept, over = tmp_path / "serving.json", time.monotonic() + 60
    rows = [{"system": name, "adapters": n} for name in ("loraplex", "vllm") for n in (0, 2)]
    kept.write_text(json.dumps(rows))
    options = {"model": tmp_path, "load": Load(((0,),), 1, 1, 1, 1), "dtype": None}
    (result,) = compare_serving(tmp_path, kept=kept, deadline=over, **options)
    assert result["rows"] == rows


def test_both_files_hold_every_section_whatever_became_of_it(tmp_path: Path) -> None:
    def skipped(_: Path) -> list[dict[str, object]]:
        raise Skipped("vllm is not installed (pip install vllm)")

    def failing(_: Path) -> list[dict[str, object]]:
        raise RuntimeError("<script>no</script>")

    works = {
        "kernels": lambda _: [roofline_shares(CELLS)],
        "serving": skipped,
        "profile": failing,
        "device tests": lambda _: [test_counts(JUNIT)],
    }
    assert run_sections(new_report(), works, tmp_path, say=lambda _: None)
    document = json.loads((tmp_path / "report.json").read_text())
    assert [s["state"] for s in document["sections"]] == ["done", "skipped", "failed", "done"]
    assert document["device"] == MADE_UP
    page = (tmp_path / "report.html").read_text()
    assert "Made-up GPU &lt;no such device&gt;" in page
    assert "<script>" not in page
    assert all(text in page for text in ("made-up qkv", "tests.made_up.fails", "not installed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_stop_leaves_what_was_done(tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []

    def stopped(folder: Path) -> Iterator[dict[str, object]]:
        yield {"rows": [{"adapters": 16}]}
        seen.append(json.loads((folder / "report.json").read_text())["sections"][1])
        raise KeyboardInterrupt

    works = {"kernels": lambda _: [roofline_shares(CELLS)], "serving": stopped, "profile": stopped}
    assert not run_sections(new_report(), works, tmp_path, say=lambda _: None)
    assert [section["state"] for section in seen] == ["running"]
    assert seen[0]["result"] == {"rows": [{"adapters": 16}]}
    document = json.loads((tmp_path / "report.json").read_text())
    assert [s["state"] for s in document["sections"]] == ["done", "stopped", "not run"]
    assert document["sections"][1]["result"] == seen[0]["result"]
    assert "made-up qkv" in (tmp_path / "report.html").read_text()


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    ran: list[str] = []

    def work(name: str, *, breaks: bool = False) -> Callable[[Path], list[dict[str, object]]]:
        def run(_: Path) -> list[dict[str, object]]:
            ran.append(name)
            if breaks:
                raise RuntimeError("no")
            return [{"by": name}]

        return run

    assert done_before(new_report(), tmp_path) == []
    first = {"kernels": work("first"), "serving": work("breaks", breaks=True)}
    assert run_sections(new_report(), first, tmp_path, say=lambda _: None)
    again = {"kernels": work("again"), "serving": work("again")}
    kept = done_before(new_report(), tmp_path)
    assert run_sections(new_report(), again, tmp_path, kept=kept, say=lambda _: None)
    assert ran == ["first", "breaks", "again"]
    document = json.loads((tmp_path / "report.json").read_text())
    assert [s["state"] for s in document["sections"]] == ["done", "done"]
    assert [s["result"] for s in document["sections"]] == [{"by": "first"}, {"by": "again"}]
    for other in (
        Report(MADE_UP, {"torch": "9.9", "vllm": None}, "another", "2026"),
        Report(MADE_UP, {"torch": "9.10", "vllm": None}, "abc1234", "2026"),
        Report({"name": "another"}, {"torch": "9.9", "vllm": None}, "abc1234", "2026"),
    ):
        assert done_before(other, tmp_path) == []


def test_a_section_that_hangs_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ends = 0.0, []

    def hang(folder: Path, *, plan: Plan) -> list[dict[str, object]]:
        nonlocal now
        ends.append(plan.deadline)
        now = plan.deadline
        return []

    monkeypatch.setattr(sections.time, "monotonic", lambda: now)
    for name in ("_profile", "_lora_kernels", "_attention", "_device_tests", "_serving"):
        monkeypatch.setattr(
            sections, name, lambda folder, *, plan, files=(): hang(folder, plan=plan)
        )
    for work in sections_of(Plan(None, True, quick=True, deadline=3600)).values():
        work(tmp_path)
    assert ends == pytest.approx([600 * (i + 1) for i in range(6)])


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_ends_with_all_that_it_started(
    deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtests.gpu_report.process._GRACE_S", 0.5)
    read, write = os.pipe()
    child = "import signal, time\n" + "signal.signal(15, signal.SIG_IGN)\n" * deaf
    child += "print('ready', flush=True)\ntime.sleep(600)"
    start = f"subprocess.run([sys.executable, '-c', {child!r}], close_fds=False)"
    code = f"import subprocess, sys; {start}"
    log = tmp_path / "log"
    # The pipe's end is every child's: it closes when the last of them is gone.
    os.set_inheritable(write, True)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", partial(real, pass_fds=(write,)))
    assert run_until([sys.executable, "-c", code], log, time.monotonic() + 3, cwd=tmp_path) is None
    os.close(write)
    assert select.select([read], [], [], 60)[0]
    assert os.read(read, 1) == b""
    os.close(read)
    assert log.read_text() == "ready\n"


def test_a_command_that_ends_by_itself_has_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('said'); raise SystemExit(3)"]
    assert run_until(command, tmp_path / "log", time.monotonic() + 60, cwd=tmp_path) == 3
    assert (tmp_path / "log").read_text() == "said\n"


def test_every_file_with_a_device_test_is_run() -> None:
    """Files are marked in the source or by their folder."""
    root = Path(__file__).parents[2]
    found = device_test_files()
    assert found[0].startswith("tests/kernels/triton/device/")
    assert "tests/server/engine/test_step_graphs.py" in found
    for folder in ("tests/kernels", "tests/server"):
        for file in (root / folder).rglob("test_*.py"):
            name = file.relative_to(root).as_posix()
            assert ("mark.gpu" not in file.read_text()) or name in found


def test_no_section_begins_after_the_end_of_the_time(tmp_path: Path) -> None:
    report = new_report()
    plan = Plan(tmp_path, has_device=True, quick=True, deadline=time.monotonic() - 1)
    assert run_sections(report, sections_of(plan), tmp_path, say=lambda _: None)
    assert [section.state for section in report.sections] == ["skipped"] * len(SECTIONS)
    assert all("time was over" in section.why for section in report.sections)


def test_a_machine_without_network_is_told_its_wheels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--wheels"]) == 0
    listed = capsys.readouterr().out.split()
    assert f"torch=={version('torch')}" in listed
    assert not any(line.startswith("loraplex==") for line in listed)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_first_piece_runs_dry_and_other_pieces_join_its_report(tmp_path: Path) -> None:
    """On a CPU tests are collected, kernels are listed, and a tiny base is profiled."""
    assert main(["--dry-run", f"--out={tmp_path}", "--only=first"]) == 0
    assert main(["--dry-run", f"--out={tmp_path}", "--only=LoRA kernels", "--only=attention"]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["sections"]
    names = ["core tests", "profile", "LoRA kernels", "attention"]
    assert [(each["name"], each["state"]) for each in found] == [(name, "done") for name in names]
    profiled = found[1]["result"]
    assert (profiled["steps"] >= 20, profiled["lost at start"]) == (True, [])


@pytest.mark.slow
@pytest.mark.nightly
def test_a_dry_run_serves_a_tiny_base_made_on_the_spot(tmp_path: Path) -> None:
    command = ["--dry-run", f"--out={tmp_path}", "--only=serving", "--only=device tests"]
    assert main(command) == 0
    document = json.loads((tmp_path / "report.json").read_text())
    assert [section["state"] for section in document["sections"]] == ["done", "done"]
    serving = document["sections"][0]["result"]
    ours = [row for row in serving["rows"] if row["system"] == "loraplex"]
    assert [(row["adapters"], row["answered"], row["lost"]) for row in ours] == [
        (0, 4, 0),
        (2, 4, 0),
    ]
    assert "without vllm" in serving or any(row["system"] == "vllm" for row in serving["rows"])
