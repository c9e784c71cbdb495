"""systemd finds nothing wrong with the unit, and its commands are real ones."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.real_commands import check_commands

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "loraplex.service"
PROGRAM = "/opt/loraplex/bin/loraplex"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("loraplex"))
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, program))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_commands_are_real() -> None:
    lines = UNIT.read_text().splitlines()
    commands = [line.split("=", 1)[1] for line in lines if line.startswith("ExecStart")]
    assert len(commands) == 2
    for command in commands:
        check_commands(command.replace(PROGRAM, "loraplex"))
