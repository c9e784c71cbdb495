"""The command `llm`, by `extra-openai-models.yaml`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "llm"

_MODEL = """
- model_id: my-{name}
  model_name: {name}
  api_base: {url}/v1
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture
def run(url: str, tmp_path: Path) -> Callable[..., str]:
    models = (_MODEL.format(name=name, url=url) for name in ("base", "pirate", "tool-calls"))
    (tmp_path / "extra-openai-models.yaml").write_text("".join(models))

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


_GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "40")


@pytest.mark.parametrize("stream", [(), ("--no-stream",)])
def test_prompt(
    run: Callable[..., str], ask: Callable[[str, str], str], stream: tuple[str, ...]
) -> None:
    """a prompt through an adapter, streamed and whole"""
    assert run("-m", "my-pirate", *_GREEDY, *stream, "Hello!").strip() == (
        ask("pirate", "Hello!").strip()
    )


def test_schema(run: Callable[..., str], tmp_path: Path) -> None:
    """`--schema`"""
    schema = tmp_path / "trip.json"
    schema.write_text(json.dumps(Trip.model_json_schema()))
    Trip.model_validate_json(run("-m", "my-base", *_GREEDY, "--schema", str(schema), PLAN))


def test_tools(run: Callable[..., str]) -> None:
    """`--functions`: a tool is called and its result used"""
    code = 'def get_weather(city: str) -> str:\n    "Weather of a city"\n    return "rain"\n'
    answer = run("-m", "my-tool-calls", *_GREEDY, "--functions", code, WEATHER)
    assert "rain" in answer
