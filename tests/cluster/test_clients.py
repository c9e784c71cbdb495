"""The tests of the official clients, as they are, against a cluster instead of one process."""

from collections.abc import Iterator
from types import ModuleType

import anthropic
import pytest
from openai import OpenAI

from tests.contract import (
    test_anthropic_client,
    test_batches,
    test_openai_client,
    test_openai_responses,
)
from tests.contract.conftest import INFER
from tests.support.servers.cluster_process import ClusterProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

_MODULES = (test_openai_client, test_openai_responses, test_anthropic_client, test_batches)
_LEFT_OUT = {
    # where an adapter lies is known a second later
    "test_an_adapter_comes_and_goes_while_the_server_runs",
    "test_models_are_listed_base_first_and_shown_one_by_one",  # the cluster has other adapters, too
    "test_after_a_kill_every_line_is_answered_exactly_once",  # starts a server of its own
}


@pytest.fixture(scope="module")
def server(cluster: ClusterProcess) -> ClusterProcess:
    return cluster


@pytest.fixture(scope="module")
def client(cluster: ClusterProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.url}/v1", api_key=INFER, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(cluster: ClusterProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=cluster.url, api_key=INFER, max_retries=0) as client:
        yield client


def _tests_of(module: ModuleType) -> dict[str, object]:
    """Under names that say whose they are."""
    kind = module.__name__.rpartition(".")[2]
    return {
        f"{kind}__{name.removeprefix('test_')}": value
        for name, value in vars(module).items()
        if name.startswith("test_") and name not in _LEFT_OUT
    }


for _module in _MODULES:
    globals().update(_tests_of(_module))
