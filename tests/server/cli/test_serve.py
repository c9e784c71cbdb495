"""What `loraplex serve` settles before the model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex_server.cli.app import app


@pytest.mark.parametrize(("given", "expected"), [(None, "3000"), ("7", "7")])
def test_compute_threads_spin_briefly_unless_told_otherwise(
    given: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    command = ["serve", f"--model={tmp_path / 'none'}", "--port=0", f"--state-dir={tmp_path}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "error:" in result.output
    assert os.environ["GOMP_SPINCOUNT"] == expected
