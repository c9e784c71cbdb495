"""Contents come whole and verified, or not at all."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue import bucket as buckets
from loraplex_adapter_store.catalogue.bucket import Bucket
from loraplex_adapter_store.catalogue.catalogue import Catalogue, sweep
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.catalogue.name_log import BURY_S, GRACE_S
from loraplex_adapter_store.contents.content_files import CONFIG_FILE, PLAN_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import (
    HostTierFull,
    LoadCancelled,
    StoredAdapterDamaged,
    UnknownAdapter,
)
from loraplex_adapter_store.names.name_state import seal, unseal
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.catalogue.conftest import ALWAYS_ASK, OpenStore
from tests.adapter_store.test_store import put, seed_of
from tests.support.adapters.packers import TensorsAside
from tests.support.servers.server_process import run_python


def objects_of(catalogue: Catalogue, digest: str) -> dict[str, str]:
    """File name → key, of the one upload of ``digest``."""
    (upload,) = catalogue.contents.uploads(digest)
    return {key.rpartition("/")[2]: key for key in upload.keys}


def local_files(store: AdapterStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE, "manifest.json"])
def test_a_corrupt_object_is_refused_and_nothing_of_it_stays(
    file: str, open_store: OpenStore, catalogue: Catalogue
) -> None:
    a, b = open_store("a"), open_store("b")
    key = objects_of(catalogue, put(a, "x", 1))[file]
    whole = catalogue._bucket.read(key, 1 << 30)
    assert whole is not None
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    for damaged in (flipped, whole[:-1], b""):
        catalogue._bucket.write(key, damaged)
        with pytest.raises(StoredAdapterDamaged, match="damaged"):
            b.acquire("x")
        assert local_files(b) == []
    catalogue._bucket.write(key, whole)
    with b.acquire("x") as lease:
        assert seed_of(lease.plan) == 1


def test_the_weights_of_another_adapter_under_a_digest_are_refused(
    open_store: OpenStore, catalogue: Catalogue
) -> None:
    """Even with a manifest that fits them: the digest is computed from the bytes that came."""
    a, b = open_store("a"), open_store("b")
    mine, others = (objects_of(catalogue, put(a, name, n)) for n, name in ((1, "one"), (2, "two")))
    read = catalogue._bucket.read
    weights = read(others[WEIGHTS_FILE], 1 << 30)
    sealed = read(mine["manifest.json"], 1 << 30)
    assert weights is not None
    assert sealed is not None
    manifest = unseal(sealed)
    sha256 = hashlib.sha256(weights).hexdigest()
    manifest["files"][WEIGHTS_FILE] = {"n_bytes": len(weights), "sha256": sha256}
    catalogue._bucket.write(mine["manifest.json"], seal(manifest))
    catalogue._bucket.write(mine[WEIGHTS_FILE], weights)
    with pytest.raises(StoredAdapterDamaged):
        b.acquire("one")
    with b.acquire("two") as lease:
        assert seed_of(lease.plan) == 2


def test_files_that_were_damaged_on_the_disk_are_fetched_again(open_store: OpenStore) -> None:
    a, b = open_store("a"), open_store("b")
    digest = put(a, "x", 1)
    b.acquire("x").release()
    plan = b.state.files.path(digest) / PLAN_FILE
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    b.state.tier.drop(digest)
    with b.acquire("x") as lease:
        assert seed_of(lease.plan) == 1


def test_a_content_is_fetched_once_however_many_ask(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = open_store("a"), open_store("b")
    put(a, "x", 1)
    fetched: list[str] = []
    parts = Bucket.parts

    def counted(self: Bucket, key: str, n_bytes: int) -> Iterator[bytes]:
        fetched.append(key)
        return parts(self, key, n_bytes)

    monkeypatch.setattr(Bucket, "parts", counted)
    start = threading.Barrier(8)

    def ask(_: int) -> float:
        start.wait()
        with b.acquire("x") as lease:
            return seed_of(lease.plan)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [1] * 8
    assert len(fetched) == len(set(fetched)) == 3


def test_a_fetch_ends_with_its_request_and_leaves_nothing_but_serves_others(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = open_store("a"), open_store("b")
    put(a, "x", 1)
    left = threading.Event()
    reached, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(buckets, "_PART_BYTES", 512)
    parts = Bucket.parts

    def paused(self: Bucket, key: str, n_bytes: int) -> Iterator[bytes]:
        for part in parts(self, key, n_bytes):
            reached.set()
            assert go_on.wait(60)
            yield part

    monkeypatch.setattr(Bucket, "parts", paused)
    with ThreadPoolExecutor(2) as pool:
        mine = pool.submit(b.acquire, "x", left)
        assert reached.wait(60)
        left.set()
        other = pool.submit(b.acquire, "x")  # waits for the load that is about to be cancelled
        go_on.set()
        with pytest.raises(LoadCancelled):
            mine.result(60)
        with other.result(60) as lease:
            assert seed_of(lease.plan) == 1
    assert not any((b.root / "catalogue-cache" / "staging").iterdir())


def test_the_disk_keeps_to_its_budget_and_what_left_it_comes_back(
    open_store: OpenStore,
) -> None:
    a = open_store("a")
    digests = {f"x{seed}": put(a, f"x{seed}", seed) for seed in range(1, 6)}
    size = a.get("x1").n_bytes.disk
    limits = CatalogueLimits(refresh_s=0.0, poll_s=3600.0, disk_bytes=2 * size + size // 2)
    b = open_store("b", limits=limits, host_bytes=a.get("x1").n_bytes.host)
    for turn in range(2):
        for name, digest in digests.items():
            with b.acquire(name) as lease:
                assert (lease.digest, f"x{seed_of(lease.plan):g}") == (digest, name)
            there = set(b.state.files.digests())
            assert digest in there, turn
            assert len(there) <= 2
    tight = CatalogueLimits(refresh_s=0.0, poll_s=3600.0, disk_bytes=size - 1)
    with pytest.raises(HostTierFull, match="--catalogue-disk"):
        open_store("c", limits=tight).acquire("x1")


def test_what_was_not_loaded_or_uploaded_for_longest_leaves_the_disk(
    open_store: OpenStore,
) -> None:
    a = open_store("a", engine=EngineHooks(TensorsAside()))
    digests = [put(a, f"x{seed}", seed) for seed in range(1, 4)]
    size = a.state.files.n_bytes(a.state.files.path(digests[0])) + a.state.packed.n_bytes(
        digests[0]
    )
    limits = CatalogueLimits(refresh_s=0.0, poll_s=3600.0, disk_bytes=2 * size + size // 2)
    b = open_store("b", limits=limits, engine=EngineHooks(TensorsAside()))
    for name in ("x1", "x2", "x1", "x3"):
        b.acquire(name).release()
        b.garbage.finish()  # the packed form is on the disk
        assert b.unload_digest(b.get(name).digest) == 0
    assert set(b.state.files.digests()) == {digests[0], digests[2]}
    digests.append(put(b, "x4", 4))
    assert set(b.state.files.digests()) == {digests[2], digests[3]}
    b.acquire("x2").release()
    assert set(b.state.files.digests()) == {digests[1], digests[3]}


def test_a_start_with_a_catalogue_leaves_the_adapters_of_the_root_alone(
    tmp_path: Path, base: BaseSpec
) -> None:
    root = tmp_path / "a"
    with AdapterStore(root, base, n_kept_revisions=1, engine=EngineHooks(TensorsAside())) as store:
        older, mine = put(store, "x", 1), put(store, "x", 2)
    files = {path: path.read_bytes() for path in local_files(store) if path.suffix != ".sqlite3"}
    catalogue = Catalogue.open(f"file://{tmp_path}/catalogue", base)
    for _ in range(2):
        with AdapterStore(
            root,
            base,
            catalogue=catalogue,
            catalogue_limits=ALWAYS_ASK,
            engine=EngineHooks(TensorsAside()),
        ) as store:
            put(store, "y", 3)
            assert [card.name for card in store.list()] == ["y"]
            put(store, "twin", 2)  # the content that x has without a catalogue
            store.delete("twin")
    assert {path: path.read_bytes() for path in files} == files
    with AdapterStore(root, base, n_kept_revisions=1) as store:
        assert [(card.name, card.digest) for card in store.list()] == [("x", mine)]
        for digest, seed in ((mine, 2), (older, 1)):
            with store.acquire(f"x@{digest}") as lease:
                assert (lease.digest, seed_of(lease.plan)) == (digest, seed)


def test_a_server_killed_between_content_and_name_leaves_nothing_to_see(
    tmp_path: Path, base: BaseSpec
) -> None:
    url = f"file://{tmp_path}/catalogue"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from loraplex_adapter_store.base_spec import BaseSpec\n"
        "from loraplex_adapter_store.catalogue.catalogue import Catalogue\n"
        "from loraplex_adapter_store.catalogue.name_log import NameLog\n"
        "from loraplex_adapter_store.store import AdapterStore\n"
        "from tests.adapter_store.test_store import put\n"
        "from tests.support.bases.tiny_models import tiny_llama\n"
        "base = BaseSpec.of(tiny_llama(), 'tiny-llama')\n"
        "NameLog.change = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "root, url = sys.argv[1:]\n"
        "put(AdapterStore(Path(root), base, catalogue=Catalogue.open(url, base)), 'x', 1)\n"
    )
    status, output = run_python(script, str(tmp_path / "a"), url)
    assert status == -signal.SIGKILL, output
    catalogue = Catalogue.open(url, base)
    (upload,) = catalogue.contents.uploads()
    for server in ("a", "b"):
        with AdapterStore(
            tmp_path / server, base, catalogue=catalogue, catalogue_limits=ALWAYS_ASK
        ) as store:
            assert store.list() == ()
            with pytest.raises(UnknownAdapter):
                store.acquire("x")
            assert local_files(store) == []
    assert sweep(catalogue) == 0  # it could get its name yet
    age(tmp_path / "catalogue", GRACE_S + 1)
    assert sweep(catalogue) == 1
    assert catalogue.contents.uploads() == []
    with AdapterStore(tmp_path / "a", base, catalogue=catalogue) as store:
        assert put(store, "x", 1) == upload.digest


def age(folder: Path, seconds: float, keep: Callable[[Path], bool] = lambda path: False) -> None:
    """Makes every object older, by the clock of the object store."""
    for path in folder.rglob("*"):
        if path.is_file() and not keep(path):
            status = path.stat()
            os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def test_garbage_goes_after_the_grace_and_what_is_named_or_kept_stays(
    tmp_path: Path, base: BaseSpec
) -> None:
    catalogue = Catalogue.open(f"file://{tmp_path}/catalogue", base)
    with AdapterStore(
        tmp_path / "a",
        base,
        catalogue=catalogue,
        catalogue_limits=ALWAYS_ASK,
        n_kept_revisions=1,
    ) as store:
        first, second, third = (put(store, "x", seed) for seed in (1, 2, 3))
        gone = put(store, "gone", 4)
        twin = put(store, "twin", 3)
        assert twin == third
        store.delete("gone")
        assert sweep(catalogue) == 0
        with store.leases.acquire_digest("gone", gone) as lease:  # a request may still hold it
            assert seed_of(lease.plan) == 4
        age(tmp_path / "catalogue", GRACE_S + 1)
        assert sweep(catalogue) == 2
        left = {upload.digest for upload in catalogue.contents.uploads()}
        assert left == {second, third}
        assert first not in left
        store.rollback("x")
        assert store.get("x").digest == second
        store.delete("twin")
        age(tmp_path / "catalogue", BURY_S + 1)
        assert sweep(catalogue) == 1  # the twin's own copy
        names = {path.parent.name for path in (tmp_path / "catalogue").rglob("names/*/*/*.json")}
        assert names == {"x"}
        assert [card.name for card in store.list()] == ["x"]
        put(store, "gone", 5)
        assert store.get("gone").revision == 1
    with AdapterStore(tmp_path / "b", base, catalogue=catalogue) as other:
        with other.acquire("x") as lease:
            assert seed_of(lease.plan) == 2
        with other.acquire(f"x@{third[:12]}") as lease:
            assert seed_of(lease.plan) == 3


def test_a_content_whose_copy_went_with_another_name_is_found_in_its_own(
    tmp_path: Path, base: BaseSpec
) -> None:
    catalogue = Catalogue.open(f"file://{tmp_path}/catalogue", base)
    with AdapterStore(
        tmp_path / "a", base, catalogue=catalogue, catalogue_limits=ALWAYS_ASK
    ) as store:
        put(store, "x", 1)
        put(store, "twin", 1)  # what the store knows of the content now
        store.delete("twin")
        age(tmp_path / "catalogue", GRACE_S + 1)
        assert sweep(catalogue) == 1
        store.state.files.remove(store.get("x").digest)
        store.state.tier.drop(store.get("x").digest)
        with store.acquire("x") as lease:
            assert seed_of(lease.plan) == 1


@pytest.mark.parametrize("n_finds", [1, 2])
def test_a_digest_is_leased_whose_name_is_deleted_between_two_looks(
    n_finds: int, open_store: OpenStore
) -> None:
    store = open_store("a")
    digest = put(store, "x", 1)
    leasing = store.leases
    index = leasing._index

    class DeletedMeanwhile:
        n_left = n_finds

        def __getattr__(self, name: str) -> object:
            return getattr(index, name)

        def find(self, name: str, prefix: str | None = None) -> object:
            found = index.find(name, prefix)
            self.n_left -= 1
            if self.n_left == 0:
                store.delete("x")
            return found

    leasing._index = DeletedMeanwhile()  # type: ignore[assignment]
    with store.leases.acquire_digest("x", digest) as lease:
        assert seed_of(lease.plan) == 1
    with pytest.raises(UnknownAdapter):
        store.get("x")
