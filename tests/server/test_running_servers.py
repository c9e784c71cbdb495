"""Servers of this machine are found by the command line, dead ones forgotten."""

import subprocess
import sys
from pathlib import Path

from loraplex_server.running_servers import announced, running_servers


def test_a_server_is_found_while_it_runs(tmp_path: Path) -> None:
    with announced(tmp_path, "http://127.0.0.1:1"):
        assert [each.url for each in running_servers(tmp_path)] == ["http://127.0.0.1:1"]
    assert running_servers(tmp_path) == []


def test_a_killed_server_is_forgotten(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file = tmp_path / "servers" / f"{ended.pid}.json"
    file.parent.mkdir()
    file.write_text('{"url": "http://127.0.0.1:1"}')
    assert running_servers(tmp_path) == []
    assert not file.exists()


def test_a_home_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "servers").write_text("a file where the folder should be")
    with announced(tmp_path, "http://127.0.0.1:1"):
        assert running_servers(tmp_path) == []
