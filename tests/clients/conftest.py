"""Runs in the clients' Python, where nothing of ours is installed; `make clients` starts it."""

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent
_URL = os.environ.get("LORAPLEX_CLIENTS_URL", "")
# The clients are no part of `make test`; what writes their table is.
collect_ignore = (
    []
    if _URL
    else [file.name for file in _FOLDER.glob("test_*.py") if file.name != "test_table.py"]
)


@pytest.fixture(scope="session")
def url() -> str:
    """The server's, without `/v1`."""
    return _URL


@pytest.fixture(scope="session")
def ask(url: str) -> Callable[[str, str], str]:
    """The greedy answer of ``ask(model, text)``, 40 tokens, without any client."""

    def post(model: str, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 40}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        assert content
        return content

    return post


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file names its client's distribution in ``CLIENT``, a test what it tries in a docstring."""
    for item in items if _URL else ():  # these hooks see all tests of a run
        assert isinstance(item, pytest.Function)
        client = item.module.CLIENT
        item.user_properties.append(("client", f"{client} {version(client)}"))
        item.user_properties.append(("tried", item.function.__doc__))
        _write(item.nodeid, item.user_properties, "not run")  # until it has ended


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _URL and (report.when == "call" or report.outcome != "passed"):
        _write(report.nodeid, report.user_properties, report.outcome)


def _write(test: str, properties: list[tuple[str, object]], outcome: str) -> None:
    result = {"test": f"{sys.prefix} {test}", **dict(properties), "outcome": outcome}
    with Path(os.environ["LORAPLEX_CLIENTS_RESULTS"]).open("a") as results:
        results.write(json.dumps(result) + "\n")
