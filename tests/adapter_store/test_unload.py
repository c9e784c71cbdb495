"""A name whose adapter leaves host memory, and comes back with the next use."""

import pytest

from loraplex_adapter_store.errors import AdapterInUse, AdapterPinned, UnknownAdapter
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import MakeAdapter


def test_an_idle_adapter_leaves_memory_and_keeps_its_card(
    store: AdapterStore, make_adapter: MakeAdapter
) -> None:
    store.put_directory("a", make_adapter(1))
    store.acquire("a").release()
    before = store.get("a")
    assert before.n_bytes.host > 0
    after = store.unload("a")
    assert (after.n_bytes.host, after.n_bytes.disk) == (0, before.n_bytes.disk)
    assert (after.digest, after.revision, after.last_load_s) == (
        before.digest,
        before.revision,
        before.last_load_s,
    )
    assert store.stats().n_host_evictions == 0  # the budget took nothing
    assert store.unload("a") == after
    store.acquire("a").release()
    assert store.get("a").n_bytes == before.n_bytes


def test_what_is_leased_or_pinned_stays_and_the_error_says_what_to_do(
    store: AdapterStore, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(1)
    for name in ("a", "b"):
        store.put_directory(name, folder)
    with store.acquire("b"), pytest.raises(AdapterInUse, match="1 request uses adapter 'a'"):
        store.unload("a")
    store.pin("b")
    with pytest.raises(AdapterPinned, match=r"the content of 'b'.*unpin 'b'"):
        store.unload("a")
    with pytest.raises(AdapterPinned, match="'b' is pinned"):
        store.unload("b")
    assert store.unload_digest(store.get("a").digest) == 0
    assert store.get("a").n_bytes.host > 0
    store.unpin("b")
    assert store.unload("a").n_bytes.host == store.get("b").n_bytes.host == 0
    with pytest.raises(UnknownAdapter):
        store.unload("nobody")
