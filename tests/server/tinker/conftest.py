"""A real server with a tiny base, and the package tinker as its client."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types
from tinker.lib.internal_client_holder import ClientConnectionPool, InternalClientHolder
from transformers import AutoModelForCausalLM

from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

KEY = "tml-anything"  # the server has no keys; the package wants this prefix


@pytest.fixture(autouse=True)
def _close_first_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the connections of the package's first calls, which it leaves open."""
    pools = []
    make = InternalClientHolder._create_client_connection_pool

    def recorded(*args: Any, **options: Any) -> ClientConnectionPool:
        pool = make(*args, **options)
        if options.get("client_config") is not None:
            pools.append(pool)
        return pool

    monkeypatch.setattr(InternalClientHolder, "_create_client_connection_pool", recorded)
    yield
    for pool in pools:
        asyncio.run_coroutine_threadsafe(pool.close(), pool._loop).result(30)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base whose answers a small LoRA can change: the initial head is nearly uniform."""
    folder = save_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 8
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def server(tiny_base: Path, state_dir: Path) -> Iterator[ServerProcess]:
    with server_process(tiny_base, state_dir, "--allow-training") as running:
        yield running


@pytest.fixture
def service(server: ServerProcess) -> Iterator[tinker.ServiceClient]:
    with connected(server) as client:
        yield client


@pytest.fixture
def rest(server: ServerProcess) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=KEY)


@contextmanager
def connected(server: ServerProcess, key: str = KEY) -> Iterator[tinker.ServiceClient]:
    """Yield a client with a session, which ends with the block."""
    with tinker.ServiceClient(base_url=server.url, api_key=key) as client:
        assert client.holder.get_session_id()
        yield client


def new_client(service: tinker.ServiceClient, seed: int = 1) -> tinker.TrainingClient:
    """Return a training client of a small LoRA."""
    return service.create_lora_training_client("tiny", rank=4, seed=seed).result()


def datum(
    tokens: Sequence[int], weights: Sequence[float] | None = None, **inputs: object
) -> types.Datum:
    """Return the datum of a sequence, whose tokens predict the next one."""
    fields = {"target_tokens": list(tokens[1:]), **inputs}
    if not inputs:
        fields["weights"] = [1.0] * (len(tokens) - 1) if weights is None else list(weights)
    return types.Datum(types.ModelInput.from_ints(list(tokens[:-1])), fields)  # type: ignore[arg-type]


def logprobs_of(client: tinker.TrainingClient, data: list[types.Datum]) -> list[list[float]]:
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    return [list(output["logprobs"].data) for output in outputs]


def step(client: tinker.TrainingClient, rate: float = 1e-3) -> None:
    client.optim_step(types.AdamParams(learning_rate=rate)).result()
