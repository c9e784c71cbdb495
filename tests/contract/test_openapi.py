"""The API is what /openapi.json says: schemathesis with all its checks against a real server.

Routes are found in the schema: a new one is tested without a word here.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.timeout(900)  # some fifty routes, one after the other
HERE = Path(__file__).parent
ADAPTER = "kept"
KEY = "key-of-the-contract"


@dataclass(frozen=True)
class Subject:
    """A server with one adapter and one job, and what its answers must not show."""

    server: ServerProcess
    headers: dict[str, str]
    job: str
    secrets: list[str]

    def run(self, *options: str) -> None:
        """Fails with schemathesis' report, which has a curl command for each failure."""
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file"]
        command += [str(HERE / "schemathesis.toml"), "run", f"{self.server.url}/openapi.json"]
        command += ["--checks", "all", "--seed", "20", "--no-color", "--continue-on-failure"]
        command += ["--warnings", "off", "--output-sanitize", "false", *options]
        for name, value in self.headers.items():
            command += ["-H", f"{name}: {value}"]
        with tempfile.TemporaryDirectory() as folder:  # its data base of examples
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
                    "SCHEMATHESIS_HOOKS": "tests.contract.schemathesis_hooks",
                    "LORAPLEX_ADAPTER": ADAPTER,
                    "LORAPLEX_JOB": self.job,
                    "LORAPLEX_HEADERS": json.dumps(self.headers),
                    "LORAPLEX_SECRETS": os.pathsep.join(self.secrets),
                },
            )
        assert done.returncode == 0, done.stdout + done.stderr
        n_tested = re.search(r"Selected: (\d+)/\1\n +Tested: (\d+)", done.stdout)
        assert n_tested is not None, done.stdout
        assert n_tested[1] == n_tested[2]
        assert int(n_tested[2]) >= 26
        assert self.server.process.poll() is None


def subject(folder: Path, *flags: str, headers: dict[str, str]) -> Iterator[Subject]:
    write_lora(folder / "adapters" / ADAPTER, BaseSpec.of(tiny_model(), "tiny/llama"))
    model = save_tiny_model(folder / "model", context=128)  # answers end soon
    flags = ("--adapters-dir", str(folder / "adapters"), *flags)
    with server_process(model, folder / "state", *flags) as server:
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            asked = client.put(f"/v1/adapters/{ADAPTER}", json={"source": ADAPTER, "wait": False})
            job = asked.json()["id"]
            assert client.get(f"/v1/jobs/{job}").status_code == 200
        secrets = [
            str(folder),
            str(Path.home()),
            "site-packages",
            "Traceback",
            str(HERE.parents[1]),
        ]
        yield Subject(server, headers, job, secrets)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    yield from subject(tmp_path_factory.mktemp("open"), headers={})


@pytest.fixture(scope="module")
def server_with_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("keyed")
    headers = {"Authorization": f"Bearer {KEY}"}
    yield from subject(folder, "--api-key", KEY, headers=headers)


@pytest.mark.nightly
def test_every_answer_is_as_documented(open_server: Subject) -> None:
    open_server.run("--phases", "examples,coverage")


@pytest.mark.slow
def test_every_answer_is_as_documented_behind_a_key(server_with_key: Subject) -> None:
    # The other phases run at night, without a key: each phase asks once.
    server_with_key.run("--max-examples", "5", "--phases", "fuzzing,stateful")


@pytest.mark.slow
@pytest.mark.nightly
def test_every_answer_is_as_documented_at_length(server_with_key: Subject) -> None:
    server_with_key.run("--max-examples", "15")
