"""A content that is in use does not vanish, whatever is put, deleted and asked for beside it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.contents.content_files import Disk
from loraplex_adapter_store.errors import UnknownAdapter
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.conftest import OpenStore
from tests.adapter_store.test_store import put
from tests.support.adapters.packers import TensorsAside


class WhileStaging(Disk):
    """Runs ``action`` when a file of prepared plans is created, which a put does after its name."""

    action: Callable[[], None] | None = None

    def before(self, operation: str, path: Path) -> None:
        action, is_file = self.action, path.parent.name == "staging"
        if operation == "create" and is_file and action is not None:
            self.action = None
            action()


def test_a_name_deleted_while_its_put_ends_goes_when_the_put_is_done(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    disk = WhileStaging()
    with opened(tmp_path / "s", base, disk=disk, engine=EngineHooks(TensorsAside())) as store:
        drained: list[bool] = []
        disk.action = lambda: drained.append(store.delete("x", timeout_s=0).drained)
        digest = put(store, "x", seed=1)
        assert drained == [False]
        with pytest.raises(UnknownAdapter):
            store.acquire("x")
    with opened(tmp_path / "s", base) as store:
        assert store.stats().n_digests == 0
    assert not list((tmp_path / "s").rglob(f"{digest}*"))


class LastPrepared(TensorsAside):
    """Remembers what it made last."""

    made: AdapterPlan | None = None

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        self.made = super().prepare(plan)
        return self.made


def test_what_a_put_prepared_goes_to_host_memory_as_it_is(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    packer = LastPrepared()
    with opened(tmp_path / "s", base, engine=EngineHooks(packer)) as store:
        put(store, "x", seed=1)
        with store.acquire("x") as lease:
            assert lease.plan is packer.made


def start_delete(store: AdapterStore, name: str) -> None:
    store.start_delete(name)


class WhilePreparing(TensorsAside):
    """Runs ``action`` inside a load, after the files were read."""

    action: Callable[[], None] | None = None

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        action, self.action = self.action, None
        if action is not None:
            action()
        return super().prepare(plan)


def test_a_name_deleted_while_it_is_loaded_is_served_once_more(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    packer = WhilePreparing()
    with opened(tmp_path / "s", base) as store:
        put(store, "x", seed=1)
    with opened(tmp_path / "s", base, engine=EngineHooks(packer)) as store:
        packer.action = lambda: start_delete(store, "x")
        with store.acquire("x") as lease:
            assert lease.plan.packed_adapter is not None
            assert store.stats().n_digests == 1
        with pytest.raises(UnknownAdapter):
            store.acquire("x")


def test_putting_and_deleting_one_name_from_many_threads_fails_nobody(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, engine=EngineHooks(TensorsAside())) as store:
        start = threading.Barrier(4)

        def work(worker: int) -> None:
            start.wait()
            for turn in range(25):
                try:
                    if worker < 2:
                        put(store, "x", seed=1 + turn % 3)
                    elif worker == 2:
                        store.delete("x", timeout_s=5)
                    else:
                        store.acquire("x").release()
                        store.get("x")
                except UnknownAdapter:
                    pass

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, worker) for worker in range(4)]:
                done.result(timeout=120)
        for card in store.list():
            store.delete(card.name)
        stats = store.stats()
        assert (stats.n_leases, stats.host_bytes_used, stats.disk_bytes) == (0, 0, 0)
