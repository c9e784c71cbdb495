"""Every command of the documentation runs, and prints what the page says.

`not_run.py` names those that cannot; they are real commands at least.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from loadtests.scenario import parse_scenario
from loraplex_server.settings.api_keys import parse_keys
from tests.docs.not_run import NOT_RUN, ON_A_CLUSTER
from tests.docs.page_examples import COMMANDS, DATA, Example, examples_of, matches, mentions_of
from tests.docs.reader import GIVEN, Reader
from tests.docs.real_commands import NotReal, check_commands
from tests.support.servers.server_process import ServerProcess, save_tiny_model

ROOT = Path(__file__).parents[2]
HISTORY = "CHANGELOG.md"  # names commands as they were
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name / "README.md" for name in ("adapter_store", "deploy", "examples", "kernels")),
        *(ROOT / name / "README.md" for name in ("loadtests", "router", "server", "tests")),
    )
}
_URL = "http://127.0.0.1:8000"  # of the pages
_COMMAND_S = 240  # other work may hold the machine
_JOB = re.compile(r"\bjob-\w+")


def _commands_of(name: str) -> list[Example]:
    return [example for example in examples_of(PAGES[name]) if example.language in COMMANDS]


def _runnable(name: str) -> list[Example]:
    others = (*NOT_RUN.get(name, ()), *ON_A_CLUSTER.get(name, ()))
    return [example for example in _commands_of(name) if not example.code.startswith(others)]


def _is_first_read(name: str) -> bool:
    """Return True for pages that CI runs; the others take minutes and run at night."""
    if name in ("docs/tutorials/train-one.md", "docs/tutorials/load-test.md"):
        return False  # half a minute each
    return "tutorials" in name or name in ("README.md", "docs/index.md")


RUN = [name for name in sorted(PAGES) if _runnable(name)]


def test_each_exception_is_one_command_of_its_page() -> None:
    for name, beginnings in (*NOT_RUN.items(), *ON_A_CLUSTER.items()):
        titles = [example.code for example in _commands_of(name)]
        for beginning in beginnings:
            assert len([code for code in titles if code.startswith(beginning)]) == 1, beginning


@pytest.mark.parametrize("name", NOT_RUN)
def test_a_command_that_is_not_run_is_a_real_one(name: str) -> None:
    for example in _commands_of(name):
        if example.code.startswith(tuple(NOT_RUN[name])) and example.language == "bash":
            check_commands(example.code)


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {HISTORY}))
def test_a_command_within_a_sentence_is_a_real_one(name: str) -> None:
    for line, code in mentions_of(PAGES[name]):
        try:
            check_commands(code, whole=False)
        except NotReal as error:
            raise AssertionError(f"{name}:{line}: {code}") from error


@pytest.mark.parametrize(
    "code",
    [
        "loraplex adapters drop mine",
        "loraplex train data.jsonl",  # where to?
        "loraplex train data.jsonl --out x --step 3",
        "loraplex serve base --kv-memory 1GiB here",
        "make lunch",
        'make soak SOUP="--minutes 1"',
        "python -m loadtests.nothing",
        "python -m loadtests.replicas --user 3",
        "python -m research.few_shot repeat",
        "python loadtests/parts/none.py",
        "pytest tests/none",
        "pip install 'loraplex[rays]'",
        "docker build -f Dockerfile.none .",
        "docker build --build-arg NONE=1 .",
        "docker run -e LORAPLEX_NONE=1 loraplex",
        "helm install lora deploy/helm/loraplex --set images.repository=x",
        "locust -f none.py",
        "serve run loraplex_server.cluster:application",
        "wget http://127.0.0.1:8000",
        "make serve; make lunch",
        "make serve  # make tea\nmake lunch",
    ],
)
def test_a_command_that_is_none_is_told(code: str) -> None:
    with pytest.raises(NotReal):
        check_commands(code)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_data_of_a_page_is_what_is_read(name: str) -> None:
    for example in examples_of(PAGES[name]):
        if example.language not in DATA:
            continue
        if example.language == "json":
            json.loads(example.code)
        elif example.language == "yaml":
            yaml.safe_load(example.code)
        elif "[[key]]" in example.code:
            pieces = enumerate(example.code.split("…"))  # of hashes
            assert parse_keys("".join(f"{i:064x}{text}" if i else text for i, text in pieces))
        else:
            assert parse_scenario("page", tomllib.loads(example.code))


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


@pytest.mark.parametrize(
    ("text", "told"),
    [("Do this:\n\n    loraplex pull\n", "indented code"), ("```sh\nloraplex pull\n```\n", "'sh'")],
)
def test_code_that_would_not_be_run_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=told):
        examples_of(tmp_path / "page.md")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page has several commands
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if _is_first_read(name) else [pytest.mark.nightly])
        for name in RUN
    ],
)
def test_the_commands_of_a_page_print_what_it_says(
    name: str, server: ServerProcess, served: Path, pulled_base: Path, tiny: Path, tmp_path: Path
) -> None:
    GIVEN.get(name, lambda reader: None)(Reader(tmp_path, served, pulled_base))
    with _left_as_it_was(server.url, served) as printed:
        for example in _runnable(name):
            code = example.code.replace(_URL, server.url)
            if "tutorials" not in name:  # where an adapter that does something is trained
                code = _quick(code, tiny)
            strict = example.output is None
            done = _run(example.language, code, server.url, tmp_path, strict=strict)
            where = f"{name}:{example.line}"
            assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
            printed.append(done.stdout)
            if example.output is not None:
                shown = example.output.replace(_URL, server.url)
                assert matches(shown, done.stdout), f"{where}\n{done.stdout}"


def _quick(code: str, base: Path) -> str:
    """Trains for a few steps of a tiny base."""
    code = code.replace("loraplex train ", f"loraplex train --base {base} --steps 1 ")
    return re.sub(r"--steps \d+", "--steps 8", code)


def _run(
    language: str, code: str, url: str, folder: Path, *, strict: bool
) -> subprocess.CompletedProcess[str]:
    """Run a command against the test's server, in a folder that the page's commands share.

    ``strict``: curl fails on an answer that is an error.
    """
    command = {
        "bash": ["bash", "-euo", "pipefail", "-c", code],
        "python": [sys.executable, "-c", code],
    }[language]
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if strict:
        bin_folder = folder / ".bin"
        bin_folder.mkdir(exist_ok=True)
        curl = bin_folder / "curl"
        curl.write_text(f'#!/bin/sh\nexec {shutil.which("curl")} --fail-with-body "$@"\n')
        curl.chmod(0o755)
        path.insert(0, str(bin_folder))
    environment = {**os.environ, "PATH": os.pathsep.join(path), "LORAPLEX_URL": url}
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
    )


@contextmanager
def _left_as_it_was(url: str, served: Path) -> Iterator[list[str]]:
    """Ends the jobs that a page has started, and takes back what it did to adapters.

    Yields the list of what its commands print.
    """
    with httpx.Client(base_url=url, timeout=120) as client:

        def cards() -> dict[str, dict[str, object]]:
            return {card["name"]: card for card in client.get("/v1/adapters").json()["data"]}

        before, printed = cards(), list[str]()
        try:
            yield printed
        finally:
            for job in set(_JOB.findall("".join(printed))):
                client.post(f"/v1/jobs/{job}/cancel")
            for folder in served.iterdir():
                shutil.rmtree(folder)
            for name, card in cards().items():
                if name not in before:
                    client.delete(f"/v1/adapters/{name}")
                elif card["defaults"] != before[name]["defaults"]:
                    patch = {**dict.fromkeys(card["defaults"]), **before[name]["defaults"]}
                    client.patch(f"/v1/adapters/{name}", json={"defaults": patch})
