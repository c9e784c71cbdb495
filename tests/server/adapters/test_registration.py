"""Adapters in a directory are there at the start, with what their cards tell."""

import json
import sys
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import InvalidName, SourceError, StoreError
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.adding import adapter_folders
from loraplex_server.adapters.adding.adapter_folders import register_adapters
from loraplex_server.settings.config import LoraModule, StoreConfig
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model


@pytest.mark.parametrize(
    ("card", "description", "examples"),
    [
        ({"description": "Says AB.", "examples": ["hi", "you"]}, "Says AB.", ("hi", "you")),
        ({"description": None, "examples": []}, "From the README.", ()),
        ({"description": 5, "examples": "x"}, "From the README.", ()),
        (None, "From the README.", ()),
    ],
)
def test_the_card_of_training_describes_an_adapter(
    tmp_path: Path,
    base_spec: BaseSpec,
    card: dict[str, object] | None,
    description: str,
    examples: tuple[str, ...],
) -> None:
    folder = write_lora(tmp_path / "echo", base_spec)
    (folder / "README.md").write_text("# echo\nFrom the README.\n")
    if card is not None:
        (folder / "card.json").write_text(json.dumps(card))
    store = AdapterStore(tmp_path / "state", base_spec)
    modules = (LoraModule("echo", folder),)
    register_adapters(store, StoreConfig(lora_modules=modules, demos=False))
    shown = store.get("echo")
    assert (shown.description, shown.examples) == (description, examples)
    store.close()


def test_a_module_whose_name_is_taken_stops_the_start(tmp_path: Path, base_spec: BaseSpec) -> None:
    modules = (LoraModule("train", write_lora(tmp_path / "echo", base_spec)),)
    with (
        AdapterStore(tmp_path / "state", base_spec) as store,
        pytest.raises(InvalidName, match="'train' is not an adapter name"),
    ):
        register_adapters(store, StoreConfig(lora_modules=modules, demos=False))


def test_a_module_that_is_not_there_stops_the_start(tmp_path: Path, base_spec: BaseSpec) -> None:
    modules = (LoraModule("sql", tmp_path / "gone"),)
    with AdapterStore(tmp_path / "state", base_spec) as store, pytest.raises(StoreError):
        register_adapters(store, StoreConfig(lora_modules=modules, demos=False))


def test_a_module_that_rsync_renews_is_served_as_it_was(
    tmp_path: Path, base_spec: BaseSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """The new config is there, the new weights are not yet."""
    folder = write_lora(tmp_path / "sql", base_spec)
    config = StoreConfig(lora_modules=(LoraModule("sql", folder),), demos=False)
    growing = folder / ".adapter_model.safetensors.AbC123"
    with AdapterStore(tmp_path / "state", base_spec) as store:
        growing.write_bytes(b"half")
        with pytest.raises(SourceError, match=r"'sql'.*rsync"):
            register_adapters(store, config)
        assert store.list() == ()
        growing.unlink()
        register_adapters(store, config)
        old = store.get("sql")
        told = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**told, "lora_alpha": 1}))
        growing.write_bytes(b"half")
        register_adapters(store, config)
        assert store.get("sql") == old
        assert "rsync" in caplog.text
        write_lora(tmp_path / "new", base_spec, seed=1)
        (tmp_path / "new" / "adapter_model.safetensors").replace(growing)
        growing.replace(folder / "adapter_model.safetensors")
        register_adapters(store, config)
        assert store.get("sql").revision == 2


@pytest.fixture
def demos(tmp_path: Path, base_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose demos fit the tiny base: the shipped ones fit the default base alone."""
    package = tmp_path / "site" / "tiny_package"
    write_lora(package / "demos" / "pirate", base_spec)
    write_lora(package / "demos" / "poet", base_spec, seed=1)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, package.name, raising=False)  # of another test
    monkeypatch.setattr(adapter_folders, "_DEMO_PATH", ("tiny_package", "demos"))
    return package / "demos"


def test_a_deleted_demo_does_not_come_back_and_a_replaced_one_stays_replaced(
    tmp_path: Path, base_spec: BaseSpec, demos: Path
) -> None:
    with AdapterStore(tmp_path / "state", base_spec) as store:
        register_adapters(store, StoreConfig())
        assert [card.name for card in store.list()] == ["pirate", "poet"]
        store.delete("pirate")
        own = store.put_directory("poet", write_lora(tmp_path / "own", base_spec, seed=5))
    with AdapterStore(tmp_path / "state", base_spec) as store:
        register_adapters(store, StoreConfig())
        assert [(card.name, card.digest) for card in store.list()] == [("poet", own.digest)]


def test_modules_and_demos_are_read_again_for_another_base(
    tmp_path: Path, base_spec: BaseSpec, demos: Path
) -> None:
    other = BaseSpec.of(tiny_model(seed=1), "tiny/llama")
    modules = (LoraModule("echo", write_lora(tmp_path / "echo", base_spec, seed=2)),)
    for base in (base_spec, other):
        with AdapterStore(tmp_path / "state", base) as store:
            register_adapters(store, StoreConfig(lora_modules=modules))
            assert [card.name for card in store.list()] == ["echo", "pirate", "poet"]
            for card in store.list():
                store.acquire(card.name).release()


def test_an_updated_demo_replaces_the_one_it_was(
    tmp_path: Path, base_spec: BaseSpec, demos: Path
) -> None:
    with AdapterStore(tmp_path / "state", base_spec) as store:
        register_adapters(store, StoreConfig())
        old = store.get("poet")
        register_adapters(store, StoreConfig())
        assert store.get("poet").revision == old.revision  # not read again
        weights = demos / "poet" / "adapter_model.safetensors"
        before = weights.stat().st_ctime_ns
        while weights.stat().st_ctime_ns == before:  # the clock of files ticks in milliseconds
            write_lora(demos / "poet", base_spec, seed=9)
        register_adapters(store, StoreConfig())
        assert store.get("poet").digest != old.digest
