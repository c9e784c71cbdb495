"""Workflows call what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_targets_and_files_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert {job["needs"]} <= set(workflow["jobs"]) if "needs" in job else True
        commands = [step["run"] for step in job["steps"] if "run" in step]
        for target in re.findall(r"\bmake ([a-z-]+)", "\n".join(commands)):
            assert target in TARGETS
        if "make ${{ matrix.target }}" in commands:
            assert set(job["strategy"]["matrix"]["target"]) <= TARGETS
        for file in re.findall(r"^\.[\w/.-]+", "\n".join(commands), re.MULTILINE):
            assert (ROOT / file).exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_artifacts_that_a_job_reads_are_written_by_the_job_it_needs(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for job in jobs.values():
        for name in _artifacts(job, "download"):
            assert name in _artifacts(jobs[job["needs"]], "upload")


def _artifacts(job: dict[str, Any], verb: str) -> list[str]:
    action = f"actions/{verb}-artifact@"
    return [s["with"]["name"] for s in job["steps"] if s.get("uses", "").startswith(action)]
