"""What a store refuses, and what it says of adapters that an earlier server could serve."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import LimitExceeded, UnknownAdapter, UnservableAdapter
from loraplex_adapter_store.names.selector import parse_selector
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_server.engine.adapters.capabilities import EngineCapabilities
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.engines import running_engine


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@contextmanager
def _store(folder: Path, model: PreTrainedModel, **config: object) -> Iterator[AdapterStore]:
    spec = BaseSpec.of(model, "tiny")
    with (
        running_engine(model, **config) as engine,
        AdapterStore(folder / "store", spec, engine=EngineHooks(engine.packer)) as store,
    ):
        yield store


def _write(folder: Path, model: PreTrainedModel, rank: int) -> Path:
    return write_lora(folder / f"rank{rank}", BaseSpec.of(model, "tiny"), rank=rank, seed=rank)


def test_what_the_engine_refuses_is_not_stored(model: PreTrainedModel, tmp_path: Path) -> None:
    source = _write(tmp_path, model, 16)
    with _store(tmp_path, model, max_lora_rank=8) as store:
        with pytest.raises(LimitExceeded, match="--max-lora-rank"):
            store.put_directory("large", source)
        with pytest.raises(UnknownAdapter):
            store.get("large")
        assert store.stats().disk_bytes == 0


def test_mixtures_that_the_engine_refuses_are_refused_when_they_are_asked_for(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with _store(tmp_path, model, max_lora_rank=8) as store:
        for name, rank in (("a", 4), ("b", 5)):
            store.put_directory(name, _write(tmp_path, model, rank))
        with pytest.raises(UnservableAdapter, match=r"rank 9 .* allows 8"):
            store.acquire(parse_selector([{"name": "a"}, {"name": "b"}]))
        assert store.stats().n_leases == 0


def test_adapters_of_an_earlier_server_stay_and_say_why_they_cannot_be_served(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with _store(tmp_path, model) as store:
        for rank in (4, 16):
            card = store.put_directory(f"rank{rank}", _write(tmp_path, model, rank))
            assert card.unservable is None
    with _store(tmp_path, model, max_lora_rank=8) as store:
        assert store.get("rank4").unservable is None
        assert "--max-lora-rank" in str(store.get("rank16").to_json()["unservable"])
        assert [card.unservable is None for card in store.list()] == [False, True]
        with pytest.raises(UnservableAdapter, match="--max-lora-rank"):
            store.acquire("rank16")
        store.acquire("rank4").release()
    with _store(tmp_path, model) as store:
        assert store.get("rank16").unservable is None
        store.acquire("rank16").release()


def test_adapters_too_large_for_the_pool_of_a_later_server_say_so_once_they_were_asked_for(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with _store(tmp_path, model) as store:
        store.put_directory("large", _write(tmp_path, model, 64))
    with _store(tmp_path, model, adapter_memory_bytes=4096) as store:
        with pytest.raises(UnservableAdapter, match="--adapter-memory"):
            store.acquire("large")
        assert "--adapter-memory" in str(store.get("large").unservable)


def test_a_store_without_an_engine_refuses_what_none_could_serve(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    spec = BaseSpec.of(model, "tiny")
    check = EngineCapabilities.of(spec, max_rank=8).check
    with AdapterStore(tmp_path / "store", spec, engine=EngineHooks(check=check)) as store:
        store.put_directory("small", _write(tmp_path, model, 8))
        with pytest.raises(LimitExceeded):
            store.put_directory("large", _write(tmp_path, model, 16))
        assert [card.name for card in store.list()] == ["small"]


def test_a_plan_that_is_folded_otherwise_by_now_replaces_the_stored_one(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    source = _write(tmp_path, model, 4)
    spec = BaseSpec.of(model, "tiny")
    with AdapterStore(tmp_path / "store", spec) as store:
        digest = store.put_directory("a", source).digest
        plan_file = tmp_path / "store" / "contents" / digest[:2] / digest / "plan.bin"
        plan_file.write_bytes(b"as an older version folded it")
    with AdapterStore(tmp_path / "store", spec) as store:
        assert "add the adapter again" in str(store.get("a").unservable)
        assert store.put_directory("a", source).unservable is None
    with AdapterStore(tmp_path / "store", spec) as store, store.acquire("a") as lease:
        assert lease.plan.digest == digest
