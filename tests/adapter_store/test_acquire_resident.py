"""Leases that need no load can be taken without waiting."""

from loraplex_adapter_store.names.selector import NameRef
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import MakeAdapter


def test_what_is_in_memory_is_leased_at_once(
    store: AdapterStore, make_adapter: MakeAdapter
) -> None:
    digest = store.put_directory("a", make_adapter(1)).digest
    store.acquire("a").release()
    lease = store.leases.acquire_resident(NameRef("a", digest[:8]))
    assert lease is not None
    assert lease.digest == digest
    assert store.get("a").n_leases == 1
    lease.release()
    assert store.get("a").n_leases == 0


def test_what_would_need_a_load_or_does_not_exist_is_none(
    store: AdapterStore, make_adapter: MakeAdapter
) -> None:
    digest = store.put_directory("a", make_adapter(1)).digest
    store.state.tier.drop(digest)
    assert store.leases.acquire_resident(NameRef("a")) is None
    assert store.leases.acquire_resident(NameRef("nobody")) is None
    store.acquire("a").release()
    assert store.leases.acquire_resident(NameRef("a", "0000")) is None
    assert store.get("a").n_leases == 0
