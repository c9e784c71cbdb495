"""The shipped console is small, built from its sources, and up to date with the API."""

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES, BUILT = ROOT / "server" / "console", ROOT / "server" / "loraplex_server" / "console"


def test_the_script_is_small() -> None:
    assert len(gzip.compress((BUILT / "console.js").read_bytes())) <= 90_000


def test_the_page_asks_for_nothing_of_other_hosts() -> None:
    for name in ("index.html", "console.css"):
        text = (BUILT / name).read_text()
        assert "//" not in text.replace("/* ", "").replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm: what is built is taken as it is")
def test_the_sources_make_what_is_shipped(tmp_path: Path) -> None:
    folder = tmp_path / "server" / "console"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("node_modules"))
    schema = tmp_path / "build" / "openapi.json"
    schema.parent.mkdir()
    command = [sys.executable, "-m", "tests.console.openapi"]
    schema.write_bytes(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)

    def npm(*arguments: str) -> None:
        done = subprocess.run(["npm", *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    npm("ci", "--no-fund", "--no-audit")
    types = folder / "src" / "lib" / "openapi.d.ts"
    before = types.read_text()
    npm("run", "types")
    assert types.read_text() == before, "the API has changed: make console"
    npm("run", "check")
    npm("run", "build")
    made = tmp_path / "server" / "loraplex_server" / "console"
    names = {path.name for path in BUILT.iterdir()}
    assert {path.name for path in made.iterdir()} == names
    for name in names:
        assert (made / name).read_bytes() == (BUILT / name).read_bytes(), f"{name}: make console"
