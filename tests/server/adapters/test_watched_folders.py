"""A directory of adapters and the server's list stay the same while the server runs."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.adding import adapter_folders, watched_folders
from loraplex_server.adapters.adding.watched_folders import WatchedFolders
from loraplex_server.settings.config import LoraModule
from tests.server.conftest import Front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def watched(front: Front) -> Iterator[Front]:
    """A front whose ``root`` is given by --adapters-dir."""
    folders = WatchedFolders(front.store, [front.root])
    folders.scan()
    folders.start()
    yield front
    folders.close()


async def until_listed(front: Front, *wanted: str) -> dict[str, str]:
    """Waits until exactly these names are listed; their digests."""
    deadline = time.monotonic() + 60
    while True:
        cards = (await front.client.get("/v1/adapters")).json()["data"]
        if [card["name"] for card in cards] == sorted(wanted):
            return {card["name"]: card["digest"] for card in cards}
        assert time.monotonic() < deadline, cards
        await asyncio.sleep(0.02)


async def test_a_folder_that_comes_is_served_and_one_that_goes_is_not(
    watched: Front, base_spec: BaseSpec
) -> None:
    write_lora(watched.root / "sql", base_spec)
    write_lora(watched.root / "team" / "poet", base_spec, seed=1)
    await until_listed(watched, "sql", "team/poet")
    assert (await watched.chat(adapter="team/poet")).status_code == 200
    shutil.rmtree(watched.root / "sql")
    await until_listed(watched, "team/poet")
    assert (await watched.chat(adapter="sql")).status_code == 404


async def test_a_request_waits_for_an_adapter_that_is_added_since_the_start(
    front: Front, base_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(8):
        write_lora(front.root / f"a{index}", base_spec, seed=index)
    added: list[str] = []
    may_add = threading.Event()

    def put_late(store: AdapterStore, module: LoraModule) -> AdapterCard:
        may_add.wait(60)
        added.append(module.name)
        return adapter_folders.put_folder(store, module)

    monkeypatch.setattr(watched_folders, "put_folder", put_late)
    folders = WatchedFolders(front.store, [front.root])
    folders.start()
    asked = [
        asyncio.create_task(front.chat(adapter="a7")),
        asyncio.create_task(front.client.get("/v1/adapters/a7")),
    ]
    assert (await front.chat(adapter="a8")).status_code == 404  # no folder: nothing to wait for
    may_add.set()
    assert [(await answer).status_code for answer in asked] == [200, 200]
    assert "a7" in added[:3]  # two threads had begun with others
    await until_listed(front, *(f"a{index}" for index in range(8)))
    folders.close()
    assert len(front.store.expected) == 0


async def test_new_weights_become_the_next_revision(watched: Front, base_spec: BaseSpec) -> None:
    write_lora(watched.root / "sql", base_spec)
    old = (await until_listed(watched, "sql"))["sql"]
    write_lora(watched.root / "sql", base_spec, seed=1)
    while (await watched.client.get("/v1/adapters/sql")).json()["digest"] == old:
        await asyncio.sleep(0.02)  # until the change is noticed
    card = (await watched.client.get("/v1/adapters/sql")).json()
    assert card["revision"] == 2


def test_a_folder_that_is_copied_slowly_is_served_when_it_is_whole(
    front: Front, base_spec: BaseSpec, caplog: pytest.LogCaptureFixture
) -> None:
    folders = WatchedFolders(front.store, [front.root])
    folder = write_lora(front.root / "sql", base_spec)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:100])
    folders.scan()
    folders.scan()
    assert front.store.list() == ()
    assert caplog.text.count("is not served") == 1  # looked at once, not at every scan
    (folder / "adapter_model.safetensors").write_bytes(weights)
    folders.scan()
    assert [card.name for card in front.store.list()] == ["sql"]


def test_a_folder_that_rsync_renews_is_read_when_it_is_whole(
    front: Front, base_spec: BaseSpec
) -> None:
    folders = WatchedFolders(front.store, [front.root])
    sql = write_lora(front.root / "sql", base_spec)
    folders.scan()
    old = front.store.get("sql")
    new = write_lora(front.root.parent / "new", base_spec, seed=1)
    config = json.loads((new / "adapter_config.json").read_text())
    (new / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    whole = front.store.put_directory("new", new)
    weights = (new / "adapter_model.safetensors").read_bytes()
    (new / "adapter_config.json").replace(sql / "adapter_config.json")
    growing = sql / ".adapter_model.safetensors.x8Yz1Q"
    for n_bytes in (0, len(weights) // 2, len(weights)):
        growing.write_bytes(weights[:n_bytes])
        folders.scan()
        assert front.store.get("sql") == old
    growing.replace(sql / "adapter_model.safetensors")
    folders.scan()
    renewed = front.store.get("sql")
    assert (renewed.revision, renewed.digest) == (2, whole.digest)


def test_what_a_killed_rsync_left_does_not_keep_a_folder_from_being_read(
    front: Front, base_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = write_lora(front.root / "sql", base_spec)
    (sql / ".adapter_model.safetensors.x8Yz1Q").write_bytes(b"half")
    (sql / ".gitattributes.Ab12Cd").write_text("of no adapter's file")
    folders = WatchedFolders(front.store, [front.root])
    folders.scan()
    assert front.store.list() == ()
    monkeypatch.setattr(adapter_folders, "_ABANDONED_S", 0.0)
    folders.scan()
    assert [card.name for card in front.store.list()] == ["sql"]


def test_a_folder_whose_name_is_taken_is_told_and_a_hidden_one_is_none(
    front: Front, base_spec: BaseSpec, caplog: pytest.LogCaptureFixture
) -> None:
    folders = WatchedFolders(front.store, [front.root])
    for name in ("train", "org/pin", ".cache/x", "org/.x"):
        write_lora(front.root / name, base_spec)
    folders.scan()
    folders.scan()
    assert front.store.list() == ()
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(text.split()[1] for text in told) == ["org/pin", "train"]
    assert all("choose" in text for text in told)


def test_what_a_client_put_under_the_name_outlives_the_folder(
    front: Front, base_spec: BaseSpec
) -> None:
    folders = WatchedFolders(front.store, [front.root])
    write_lora(front.root / "sql", base_spec)
    folders.scan()
    other = write_lora(front.root.parent / "other", base_spec, seed=3)
    own = front.store.put_directory("sql", other)
    folders.scan()
    assert front.store.get("sql").digest == own.digest
    shutil.rmtree(front.root / "sql")
    folders.scan()
    assert front.store.get("sql").digest == own.digest


def test_a_directory_that_is_away_for_a_while_takes_nothing_with_it(
    front: Front, base_spec: BaseSpec
) -> None:
    folders = WatchedFolders(front.store, [front.root])
    write_lora(front.root / "sql", base_spec)
    folders.scan()
    front.root.rename(front.root.parent / "away")
    folders.scan()
    assert [card.name for card in front.store.list()] == ["sql"]


def test_a_restart_with_another_base_reads_the_folders_again(
    front: Front, tmp_path: Path, base_spec: BaseSpec
) -> None:
    write_lora(front.root / "sql", base_spec)
    other = BaseSpec.of(tiny_model(seed=1), "tiny/llama")
    for base in (base_spec, other):
        with AdapterStore(tmp_path / "state", base) as store:
            WatchedFolders(store, [front.root]).scan()
            store.acquire("sql").release()


def test_a_restart_reads_only_what_has_changed_since(front: Front, base_spec: BaseSpec) -> None:
    write_lora(front.root / "same", base_spec)
    write_lora(front.root / "changed", base_spec, seed=1)
    WatchedFolders(front.store, [front.root]).scan()
    write_lora(front.root / "changed", base_spec, seed=2)
    WatchedFolders(front.store, [front.root]).scan()
    assert [(card.name, card.revision) for card in front.store.list()] == [
        ("changed", 2),
        ("same", 1),
    ]
