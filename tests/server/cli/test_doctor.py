"""`loraplex doctor` and `loraplex --version`."""

import socket
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from loraplex_server.cli.app import app


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.split()) == (0, ["loraplex", version("loraplex")])


def test_doctor_names_what_is_here_and_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("LORAPLEX_PORT", str(port))
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1
        assert f"another program uses port {port}" in result.output
    assert f"torch {torch.__version__}" in result.output
    assert "CPU kernels" in result.output
