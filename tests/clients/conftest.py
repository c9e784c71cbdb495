"""Runs in the clients' Python, where nothing of ours is installed; `make clients` starts it."""

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
        answer = _post(f"{url}/v1/chat/completions", {"model": model, "messages": messages})
        content = answer["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        assert content
        return content

    return post


@pytest.fixture(scope="session")
def complete(url: str) -> Callable[[str, str], str]:
    """The greedy completion of ``complete(model, prompt)``, 40 tokens, without any client."""

    def post(model: str, prompt: str) -> str:
        answer = _post(f"{url}/v1/completions", {"model": model, "prompt": prompt})
        text = answer["choices"][0]["text"]
        assert isinstance(text, str)
        assert text
        return text

    return post


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url,
        json.dumps({**body, "temperature": 0, "max_tokens": 40}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


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
