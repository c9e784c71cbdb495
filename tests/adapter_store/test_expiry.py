"""Names that expire, and deletions that do not wait."""

from pathlib import Path

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.card import TierBytes
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import OpenStore, plain_lora
from tests.adapter_store.test_store import put


def put_until(store: AdapterStore, name: str, seed: int, expires: float) -> None:
    config, tensors = plain_lora(seed, 4)
    store.put_tensors(name, config, tensors, options=PutOptions(expires=expires))  # type: ignore[arg-type]


def test_a_name_goes_when_its_time_has_come_also_after_a_restart(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base) as store:
        put_until(store, "early", 1, 100.0)
        put_until(store, "late", 2, 200.0)
        put(store, "stays", 3)
    with opened(tmp_path / "s", base) as store:
        assert store.next_expiry() == 100.0
        assert store.expire(99.9) == ()
        assert store.expire(100.0) == ("early",)
        assert [card.name for card in store.list()] == ["late", "stays"]
        assert store.set_expiry("late", None).expires is None
        assert store.next_expiry() is None
        assert store.expire(1e12) == ()


def test_a_put_sets_the_expiry_anew(store: AdapterStore) -> None:
    put_until(store, "x", 1, 100.0)
    put(store, "x", 2)  # now it is somebody's own
    assert store.get("x").expires is None


def test_a_deletion_that_is_started_is_done_with_the_last_lease(store: AdapterStore) -> None:
    put(store, "x", 1)
    lease = store.acquire("x")
    deletion = store.start_delete("x")
    assert deletion.n_leases == 1
    assert not deletion.freed.done()
    lease.release()
    freed = deletion.freed.result(30)
    assert freed.disk > 0
    assert freed.host > 0


def test_a_deletion_ends_when_the_content_gets_a_name_again(store: AdapterStore) -> None:
    digest = put(store, "x", 1)
    with store.acquire("x"):
        deletion = store.start_delete("x")
        assert put(store, "y", 1) == digest
        assert deletion.freed.result(0) == TierBytes(0, 0)
    with store.acquire("y") as lease:
        assert lease.digest == digest
