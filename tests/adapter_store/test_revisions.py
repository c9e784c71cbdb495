"""Older contents of a name stay for a while, can be asked for, and can become current again."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import InvalidSelector, RevisionConflict, UnknownAdapter
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import OpenStore
from tests.adapter_store.test_store import put, seed_of


@pytest.fixture
def store(tmp_path: Path, base: BaseSpec, opened: OpenStore) -> Iterator[AdapterStore]:
    with opened(tmp_path / "kept", base, n_kept_revisions=2) as store:
        yield store


def contents(store: AdapterStore) -> set[str]:
    return {path.name for path in store.state.files._contents._root.glob("*/*")}


def kept(store: AdapterStore, name: str) -> list[str]:
    return [card.digest for card in store.revisions(name)]


def test_the_newest_contents_stay_and_older_ones_are_freed(store: AdapterStore) -> None:
    digests = [put(store, "x", seed) for seed in range(1, 5)]
    assert kept(store, "x") == digests[:0:-1]
    store.garbage.finish()  # what is let go is freed there
    assert contents(store) == set(digests[1:])
    with store.acquire(f"x@{digests[1][:12]}") as lease:
        assert seed_of(lease.plan) == 2
    with pytest.raises(UnknownAdapter, match=digests[3][:12]):
        store.acquire(f"x@{digests[0][:12]}")


def test_a_rollback_makes_the_content_before_current_under_a_new_number(
    store: AdapterStore,
) -> None:
    first, second = put(store, "x", 1), put(store, "x", 2)
    card = store.rollback("x")
    assert (card.digest, card.revision, card.replaced) == (first, 3, second)
    assert kept(store, "x") == [first, second]
    with store.acquire("x") as lease:
        assert seed_of(lease.plan) == 1
    assert store.rollback("x").digest == second  # and back again


def test_a_rollback_leaves_the_expiry_of_the_name_as_it_is(store: AdapterStore) -> None:
    put(store, "x", 1)
    put(store, "x", 2)
    store.set_expiry("x", 1000.0)
    assert store.rollback("x").expires == 1000.0
    assert store.next_expiry() == 1000.0
    assert store.expire(1001.0) == ("x",)


def test_a_rollback_goes_to_the_digest_that_is_asked_for(store: AdapterStore) -> None:
    first, second, third = (put(store, "x", seed) for seed in (1, 2, 3))
    with pytest.raises(RevisionConflict):
        store.rollback("x", if_match=second)
    assert store.rollback("x", digest_prefix=first[:10], if_match=third).digest == first
    assert kept(store, "x") == [first, third, second]


def test_a_rollback_without_a_kept_revision_says_what_is_kept(store: AdapterStore) -> None:
    put(store, "x", 1)
    with pytest.raises(InvalidSelector, match="kept: none"):
        store.rollback("x")
    put(store, "x", 2)
    with pytest.raises(InvalidSelector, match="digest 0000"):
        store.rollback("x", digest_prefix="0000")


def test_a_content_put_again_is_kept_once(store: AdapterStore) -> None:
    first, second = put(store, "x", 1), put(store, "x", 2)
    put(store, "x", 1)
    put(store, "x", 1)
    assert kept(store, "x") == [first, second]


def test_deleting_a_name_frees_its_kept_revisions_and_a_new_one_has_none(
    store: AdapterStore,
) -> None:
    put(store, "x", 1)
    put(store, "x", 2)
    store.delete("x")
    store.garbage.finish()
    assert contents(store) == set()
    last = put(store, "x", 3)
    assert kept(store, "x") == [last]


def test_a_store_that_closes_waits_until_kept_revisions_are_freed(store: AdapterStore) -> None:
    free = threading.Event()
    put(store, "x", 1)
    put(store, "x", 2)
    store.garbage.later(lambda: free.wait(30))  # what is freed comes after it
    store.delete("x")
    closing = threading.Thread(target=store.close)
    closing.start()
    while not store.state.closed.is_set():
        assert closing.is_alive()
    free.set()
    closing.join()
    assert contents(store) == set()


def test_kept_revisions_survive_a_restart(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, n_kept_revisions=2) as store:
        digests = [put(store, "x", seed) for seed in (1, 2, 3)]
    with opened(tmp_path / "s", base, n_kept_revisions=2) as store:
        assert kept(store, "x") == digests[::-1]
        assert store.rollback("x", digest_prefix=digests[0]).digest == digests[0]
        with store.acquire("x") as lease:
            assert seed_of(lease.plan) == 1
