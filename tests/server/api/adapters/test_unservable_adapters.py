"""What the engine cannot serve, over HTTP: refused on every path, told of what is stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.engines import running_engine

pytestmark = pytest.mark.anyio


@contextmanager
def _front(
    tokenizer: PreTrainedTokenizerFast, spec: BaseSpec, folder: Path, **config: object
) -> Iterator[Front]:
    """A front whose store asks the packer of a real engine."""
    with running_engine(tiny_model(), **config) as engine:
        front = make_front(tokenizer, spec, folder, packer=engine.packer)
        for rank in (4, 5, 16):
            if not (front.root / f"rank{rank}").exists():
                write_lora(front.root / f"rank{rank}", spec, rank=rank, seed=rank)
        try:
            yield front
        finally:
            front.store.close()


async def test_no_path_registers_a_rank_above_the_servers(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    with _front(tokenizer, base_spec, tmp_path, max_lora_rank=8) as front:
        source = front.root / "rank16"
        put = await front.client.put("/v1/adapters/large", json={"source": str(source)})
        files = {
            "config": ("adapter_config.json", (source / "adapter_config.json").read_bytes()),
            "weights": (
                "adapter_model.safetensors",
                (source / "adapter_model.safetensors").read_bytes(),
            ),
        }
        upload = await front.client.put("/v1/adapters/large", files=files)
        vllm = {"lora_name": "large", "lora_path": str(source)}
        loaded = await front.post("/v1/load_lora_adapter", vllm)
        for answer in (put, upload, loaded):
            assert answer.status_code == 413, answer.text
            assert "--max-lora-rank" in answer.text
        assert (await front.client.get("/v1/adapters/large")).status_code == 404


async def test_a_mixture_above_the_rank_is_a_400_when_it_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    with _front(tokenizer, base_spec, tmp_path, max_lora_rank=8) as front:
        for name in ("rank4", "rank5"):
            front.store.put_directory(name, front.root / name)
        answer = await front.chat(adapter=[{"name": "rank4"}, {"name": "rank5"}])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "adapter_unservable"
        assert "rank 9" in answer.json()["error"]["message"]
        assert (await front.chat(adapter="rank5")).status_code == 200


async def test_a_mixture_that_host_memory_can_never_hold_is_a_413(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    one = write_lora(tmp_path / "one", base_spec, rank=5, seed=5)
    front = make_front(tokenizer, base_spec, tmp_path)
    n_bytes = front.store.put_directory("one", one).n_bytes.host
    front.store.close()
    front = make_front(tokenizer, base_spec, tmp_path, host_bytes=2 * n_bytes)
    try:
        assert (await front.chat(adapter=[{"name": "one"}] * 2)).status_code == 200
        answer = await front.chat(adapter=[{"name": "one"}] * 3)
        assert answer.status_code == 413, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("adapter_too_large", "adapter")
        assert f"needs {3 * n_bytes:,} bytes" in error["message"]
        assert "--adapter-host-memory" in error["message"]
    finally:
        front.store.close()


async def test_what_an_earlier_server_stored_is_listed_with_the_reason(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    with _front(tokenizer, base_spec, tmp_path) as front:
        put = {"source": str(front.root / "rank16")}
        answer = await front.client.put("/v1/adapters/large", json=put)
        assert answer.status_code == 201
        assert answer.json()["unservable"] is None
    with _front(tokenizer, base_spec, tmp_path, max_lora_rank=8) as front:
        listed = (await front.client.get("/v1/adapters")).json()["data"]
        assert "--max-lora-rank" in listed[0]["unservable"]
        answer = await front.chat(adapter="large")
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "adapter_unservable"
        assert "--max-lora-rank" in answer.json()["error"]["message"]
