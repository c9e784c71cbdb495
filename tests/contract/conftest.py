"""One real server, with adapters and keys, for the tests of every official client."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

ADMIN, INFER = "admin-key-1", "infer-key-1"
ADAPTERS = ("one", "two", "org/three")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("serve")
    model = save_tiny_model(folder / "tiny")
    spec = BaseSpec.of(tiny_model(), "tiny")
    for number, name in enumerate(ADAPTERS):
        write_lora(folder / "adapters" / name, spec, rank=2 + number, seed=number, scale=0.4)
    flags = ("--api-key", ADMIN, "--infer-api-key", INFER, "--adapters-dir", folder / "adapters")
    with server_process(model, folder / "state", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=INFER, max_retries=0) as client:
        yield client
