"""kill -9 and full disks at every operation: nothing committed is ever lost, nothing half there."""

import contextlib
import errno
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.contents.content_files import Disk
from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.conftest import plain_lora
from tests.adapter_store.files.test_packed_files import form_seed
from tests.adapter_store.test_store import put, seed_of
from tests.support.adapters.packers import TensorsAside
from tests.support.servers.server_process import run_python


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_at_any_operation_loses_nothing_that_was_committed(stride: int) -> None:
    code = "from tests.support.crash_scenario import run; run()"
    status, output = run_python(code, str(stride))
    assert status == 0, output[-3000:]
    assert json.loads(output.splitlines()[-1])["n_operations"] > 60


class FullDisk(Disk):
    """Operation ``k`` after ``arm`` fails, once."""

    def __init__(self) -> None:
        self.left: int | None = None

    def arm(self, k: int) -> None:
        self.left = k

    def before(self, operation: str, path: Path) -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left < 0:
            self.left = None
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("packer", [None, TensorsAside()])
def test_a_full_disk_at_any_operation_fails_that_put_alone(
    packer: TensorsAside | None, tmp_path: Path, base: BaseSpec
) -> None:
    seed_in = seed_of if packer is None else form_seed
    disk = FullDisk()
    with AdapterStore(tmp_path / "s", base, disk=disk, engine=EngineHooks(packer)) as store:
        put(store, "old", 1)
        k = 0
        while True:
            disk.arm(k)
            with contextlib.suppress(OSError):
                put(store, "new", 2 + k)
            finished = disk.left is not None
            disk.left = None
            with store.acquire("old") as lease:
                assert seed_in(lease.plan) == 1
            put(store, "other", 100 + k)
            with store.acquire("other") as lease:
                assert seed_in(lease.plan) == 100 + k
            if finished:
                break
            k += 1
        assert k > 8
        config, tensors = plain_lora(2)
        store.put_tensors("new", config, tensors)  # type: ignore[arg-type]
    with AdapterStore(tmp_path / "s", base) as store:
        assert {card.name for card in store.list()} == {"old", "new", "other"}
        assert not any((tmp_path / "s" / "staging").iterdir())


@pytest.mark.parametrize("schema", [5, 99])
def test_a_registry_of_another_version_is_refused(
    tmp_path: Path, base: BaseSpec, schema: int
) -> None:
    AdapterStore(tmp_path / "s", base).close()
    with closing(sqlite3.connect(tmp_path / "s" / "registry.sqlite3")) as database:
        database.execute(f"PRAGMA user_version = {schema}")
    with pytest.raises(StoreError, match=f"schema {schema}"):
        AdapterStore(tmp_path / "s", base)
