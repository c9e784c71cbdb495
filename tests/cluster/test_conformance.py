"""Adapters of each way of serving through a cluster, against PEFT's own models.

The rows are those of `tests/conformance` that also run with the references, every kind once.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conformance.heads import explain_head
from tests.conformance.judge import explain
from tests.conformance.load import N_TOKENS
from tests.conformance.test_adapters import (
    PROMPTS,
    ROWS,
    Load,
    Oracles,
    build_oracles,
    load_rows,
)
from tests.support.servers.cluster_process import cluster_process

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(1800),  # the first row waits for the whole load
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_N_MIXLORA_TOKENS = sum(len(prompt) + N_TOKENS - 1 for prompt in PROMPTS)  # that were computed
_ROWS = [row for row in ROWS if row.executor and row.refused is None and row.wrong is None]


@pytest.fixture(scope="module")
def oracles(pulled_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return build_oracles(_ROWS, pulled_base, tmp_path_factory.mktemp("oracles"))


@pytest.fixture(scope="module")
def load(
    oracles: Oracles, pulled_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Load]:
    folder = tmp_path_factory.mktemp("cluster")
    shelf = folder / "shelf"
    shelf.mkdir()
    server = {
        "model": str(pulled_base),
        "state-dir": str(folder / "state"),
        "adapters-dir": [str(shelf)],
        "dtype": "float32",
        "threads": 1,
        "kv-memory": "128MiB",
        "adapter-memory": "512MiB",
        "demos": False,
    }
    folders = [oracles.folders[row.id] for row in _ROWS if row.id in oracles.folders]
    with cluster_process({"server": server}, folder) as cluster:
        found = asyncio.run(load_rows(cluster.url, _ROWS, folders, shelf))
        routing = httpx.get(f"{cluster.url}/v1/adapters/mixlora/routing", timeout=60).json()
        assert routing["n_picks"] > 0
        assert routing["n_picks"] % _N_MIXLORA_TOKENS == 0  # of all replicas together
        yield Load(*found, cluster.log)


@pytest.mark.parametrize("row", [row.id for row in _ROWS])
def test_an_adapter_answers_as_the_model_it_was_trained_in(
    load: Load, oracles: Oracles, row: str
) -> None:
    put, questions = load.puts.get(row), load.questions[row]
    assert put is None or put.status == 201, put.message
    judge = explain if questions[0].task is None else explain_head
    problem = judge(oracles.models[row], oracles.base, questions, load.answers[row])
    assert problem is None, problem


def test_base_rows_between_adapters_are_the_base(load: Load, oracles: Oracles) -> None:
    problem = explain(oracles.base, None, load.questions[""], load.answers[""])
    assert problem is None, problem
