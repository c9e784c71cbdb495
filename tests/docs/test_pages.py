"""Every command of the README and the tutorials runs, and prints what the page says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.page_examples import Example, examples_of, matches
from tests.support.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs/index.md",
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
]
# Page → how many of its commands are shown only; each says why in the page's source.
NOT_RUN = {
    "README.md": 1,
    "index.md": 1,
    "serve-your-adapters.md": 1,
    "load-test.md": 1,
    "scale-out.md": 3,
}
_PAGES_SERVER = "http://127.0.0.1:8000"
_COMMAND_S = 240  # other work may hold the machine


def test_what_is_not_run_is_counted() -> None:
    shown = Counter(page.name for page in PAGES for example in examples_of(page) if example.not_run)
    assert shown == NOT_RUN


@pytest.mark.parametrize(
    ("page", "printed", "same"),
    [
        ("a\nb\n", "a  \nb", True),
        ("took … ms", "took 12 ms", True),
        ("took … ms", "took 12 s", False),
        ("a", "a\nb", False),
        ("1.5", "1x5", False),
    ],
)
def test_an_output_is_compared_whole(page: str, printed: str, *, same: bool) -> None:
    assert matches(page, printed) is same


def test_code_that_would_not_be_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Do this:\n\n    loraplex pull\n")
    with pytest.raises(ValueError, match="indented code"):
        examples_of(tmp_path / "page.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_print_what_it_says(
    page: Path, server: ServerProcess, tmp_path: Path
) -> None:
    for example in examples_of(page):
        if example.not_run:
            continue
        done = _run(example, server.url, tmp_path)
        where = f"{page.name}:{example.line}"
        assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
        if example.output is not None:
            shown = example.output.replace(_PAGES_SERVER, server.url)
            assert matches(shown, done.stdout), f"{where}\n{done.stdout}"


def _run(example: Example, url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With the test's server in place of the page's, in a folder that the page's commands share."""
    code = example.code.replace(_PAGES_SERVER, url)
    command = {
        "bash": ["bash", "-euo", "pipefail", "-c", code],
        "python": [sys.executable, "-c", code],
    }[example.language]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LORAPLEX_URL": url, "COLUMNS": "80"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_COMMAND_S
    )
