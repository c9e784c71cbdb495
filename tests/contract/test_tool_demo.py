"""The demo adapter calls tools that it never saw, asked by OpenAI's client over HTTP."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from research.demos import DEMOS, Pair, held_out_pairs
from research.demos.tool_calls import called
from tests.support.servers.server_process import server_process

pytestmark = pytest.mark.slow
FLAGS = ("--kv-memory", "256MiB", "--adapter-memory", "64MiB")
LEAST = 0.8  # docs/tools.md: 91 % of 216


@pytest.fixture(scope="module")
def client(pulled_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("tool-demo")
    demos = files("loraplex_adapter_store") / "demos"
    shutil.copytree(str(demos / "tool-calls"), folder / "adapters" / "tool-calls")
    with (
        server_process(
            pulled_base, folder / "state", *FLAGS, "--adapters-dir", folder / "adapters"
        ) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client,
    ):
        yield client


def strict(tools: tuple[Any, ...]) -> list[Any]:
    shown: list[Any] = json.loads(json.dumps(tools))
    for tool in shown:
        tool["function"]["strict"] = True
        tool["function"]["parameters"]["additionalProperties"] = False
    return shown


def ask(client: OpenAI, pair: Pair, choice: Any) -> list[dict[str, object]]:
    answer = client.chat.completions.create(
        model="tool-calls",
        messages=[{"role": "user", "content": pair.prompt}],
        tools=strict(pair.tools),
        tool_choice=choice,
        temperature=0,
        max_tokens=160,
    )
    calls: list[Any] = answer.choices[0].message.tool_calls or []
    return [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in calls
    ]


@pytest.mark.parametrize("n_calls", [10, pytest.param(32, marks=pytest.mark.nightly)])
def test_calls_of_unseen_tools_are_exact(client: OpenAI, n_calls: int) -> None:
    pairs = [pair for pair in held_out_pairs(DEMOS["tool-calls"], 60) if called(pair.answer)]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda pair: ask(client, pair, "required"), pairs[:n_calls]))
    exact = [calls == called(pair.answer) for pair, calls in zip(pairs, given, strict=False)]
    assert sum(exact) >= LEAST * n_calls, [
        p for p, good in zip(pairs, exact, strict=False) if not good
    ]


def test_mostly_no_tool_is_called_where_none_fits(client: OpenAI) -> None:
    pairs = [pair for pair in held_out_pairs(DEMOS["tool-calls"], 120) if called(pair.answer) == []]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda pair: ask(client, pair, "auto"), pairs[:8]))
    assert given.count([]) >= 4  # docs/tools.md: 17 of 23
