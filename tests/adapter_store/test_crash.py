"""kill -9 and full disks at every operation: nothing committed is ever lost, nothing half there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.disk import Disk
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import plain_lora
from tests.adapter_store.test_packed_files import form_seed
from tests.adapter_store.test_store import put, seed_of
from tests.support.packers import TensorsAside


def test_a_kill_at_any_operation_loses_nothing_that_was_committed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.crash_scenario"],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["n_operations"] > 60


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
    with AdapterStore(tmp_path / "s", base, disk=disk, packer=packer) as store:
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


def test_a_store_from_the_future_is_refused(tmp_path: Path, base: BaseSpec) -> None:
    import sqlite3

    AdapterStore(tmp_path / "s", base).close()
    database = sqlite3.connect(tmp_path / "s" / "registry.sqlite3")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(Exception, match="schema 99"):
        AdapterStore(tmp_path / "s", base)


def test_a_store_of_the_first_schema_is_migrated(tmp_path: Path, base: BaseSpec) -> None:
    import sqlite3

    with AdapterStore(tmp_path / "s", base) as store:
        put(store, "x", 1)
    database = sqlite3.connect(tmp_path / "s" / "registry.sqlite3")
    database.execute("DROP INDEX revisions_by_digest")
    database.execute("ALTER TABLE names DROP COLUMN expires")
    database.execute("ALTER TABLE revisions DROP COLUMN kept")
    database.execute("ALTER TABLE contents DROP COLUMN task")
    database.execute("ALTER TABLE revisions DROP COLUMN defaults")
    database.execute("ALTER TABLE revisions DROP COLUMN edits")
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    with AdapterStore(tmp_path / "s", base) as store, store.acquire("x") as lease:
        assert seed_of(lease.plan) == 1
