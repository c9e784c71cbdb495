"""The images: small rules that keep them safe to run, and their steps carried out for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.dockerfile import lint, parse

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "Dockerfile.cuda")
GOOD = """FROM python:3.11.1-slim AS build
RUN true
FROM python:3.11.1-slim
USER 1000
VOLUME /data
HEALTHCHECK CMD ["curl", "http://localhost/health"]
ENTRYPOINT ["x"]
CMD ["y"]
"""


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_with_our_images(name: str) -> None:
    assert lint(ROOT / name, ROOT) == []


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("python:3.11.1-slim AS", "python:latest AS", "not pinned"),
        ("python:3.11.1-slim AS", "python AS", "not pinned"),
        ("USER 1000\n", "", "root"),
        ("USER 1000", "USER root", "root"),
        ("USER 1000", "USER me", "by name"),
        ('ENTRYPOINT ["x"]', "ENTRYPOINT x", "shell form"),
        ('CMD ["y"]', "CMD y", "shell form"),
        ("localhost/health", "localhost/", "does not ask /health"),
        ("VOLUME /data\n", "", "VOLUME"),
        ("RUN true", "RUN apt-get install gcc", "apt-get install without --yes"),
        ("RUN true", "COPY nowhere .", "not there"),
        ("RUN true", "ENV API_KEY=abc", "secret"),
        ("FROM python:3.11.1-slim AS build\nRUN true\n", "", "one stage"),
    ],
)
def test_the_linter_sees(good: str, bad: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text(GOOD)
    assert lint(file, tmp_path) == []
    assert good in GOOD
    file.write_text(GOOD.replace(good, bad))
    assert any(problem in found for found in lint(file, tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_hadolint_agrees(name: str) -> None:
    binary = shutil.which("hadolint")
    if binary is None:
        pytest.skip("hadolint is not installed")
    command = [binary, "--failure-threshold", "warning", "--ignore", "DL3008", ROOT / name]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_both_images_install_the_same_package_in_the_same_way() -> None:
    ours, cuda = (
        [i.text for i in parse(ROOT / name)[0].instructions if i.name in ("COPY", "RUN", "WORKDIR")]
        for name in FILES
    )
    assert ours == cuda


def test_what_the_images_copy_is_not_ignored() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        word
        for instruction in parse(ROOT / "Dockerfile")[0].instructions
        if instruction.name == "COPY"
        for word in instruction.text.split()[:-1]
    }
    assert copied == kept


def test_the_compose_file_runs_the_server_without_rights_and_pins_every_image() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    ours = compose["services"]["loraplex"]
    assert ours["read_only"] is True
    assert ours["cap_drop"] == ["ALL"]
    assert "/data" in ours["volumes"][0]
    for service in compose["services"].values():
        tag = service["image"].rpartition(":")[2]
        assert tag[:1].isdigit() or tag[1:2].isdigit(), service["image"]
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), source


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_work_in_a_clean_venv() -> None:
    """Minutes, and a package index: only with LORAPLEX_DOCKER_CHECK=1, as `make docker-check`."""
    if os.environ.get("LORAPLEX_DOCKER_CHECK") != "1":
        pytest.skip("set LORAPLEX_DOCKER_CHECK=1")
    command = [sys.executable, "-m", "deploy.replay"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
