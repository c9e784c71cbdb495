"""Two servers, each with a store of its own, over one catalogue: what one does the other serves."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.errors import QuotaExceeded, RevisionConflict, UnknownAdapter
from loraplex_adapter_store.names.card import CardEdit
from loraplex_adapter_store.names.put_options import PutOptions, Quota
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.catalogue.conftest import OpenStore
from tests.adapter_store.conftest import plain_lora
from tests.adapter_store.test_store import put, seed_of


def put_if(store: AdapterStore, name: str, seed: int, **options: object) -> str:
    config, tensors = plain_lora(seed)
    given = PutOptions(**options)  # type: ignore[arg-type]
    return store.put_tensors(name, config, tensors, options=given).digest  # type: ignore[arg-type]


def test_what_one_server_puts_replaces_and_deletes_the_other_sees_at_once(
    open_store: OpenStore, catalogue: Catalogue
) -> None:
    a, b = open_store("a"), open_store("b")
    first = put(a, "team:de/formal", 1)
    with b.acquire("team:de/formal") as lease:
        assert (lease.digest, seed_of(lease.plan)) == (first, 1)
        second = put(a, "team:de/formal", 2)
        assert seed_of(lease.plan) == 1  # a request keeps what it began with
        with b.acquire("team:de/formal") as newer:
            assert (newer.digest, seed_of(newer.plan)) == (second, 2)
    assert catalogue.names.read("team:de/formal").revisions[0].content.digest == second
    b.delete("team:de/formal")
    for store in (a, b):
        with pytest.raises(UnknownAdapter):
            store.acquire("team:de/formal")
        assert store.list() == ()
    assert not catalogue.names.read("team:de/formal").revisions


@pytest.mark.parametrize("twin_is_deleted", [False, True])
def test_a_rollback_finds_a_content_that_another_name_has_too(
    twin_is_deleted: bool, open_store: OpenStore, catalogue: Catalogue
) -> None:
    a, b = open_store("a", n_kept=1), open_store("b", n_kept=1)
    first = put(a, "x", 1)
    upload = catalogue.names.read("x").revisions[0].content.upload
    put(a, "x", 2)
    assert put(a, "twin", 1) == first  # what the store knows of the content now
    if twin_is_deleted:
        a.delete("twin")
    assert a.rollback("x").digest == first
    assert catalogue.names.read("x").revisions[0].content.upload == upload
    for store in (a, b):
        with store.acquire("x") as lease:
            assert (lease.digest, seed_of(lease.plan)) == (first, 1)


def test_the_cards_are_the_same_on_every_server(open_store: OpenStore) -> None:
    a, b = open_store("a", n_kept=2), open_store("b", n_kept=2)
    put_if(a, "x", 1, description="first", examples=["hello"])
    put_if(b, "x", 2, defaults={"temperature": 0.5})
    b.edit("x", lambda card: CardEdit("edited", ("hi",), card.defaults, {"source": "told"}))
    a.set_expiry("x", 4e9)
    for mine, others in ((a, b), (b, a)):
        card, other = mine.get("x"), others.get("x")
        assert (card.description, card.provenance) == ("edited", {"source": "told"})
        assert card.expires == 4e9
        assert card.report is not None
        shown = card.to_json(), other.to_json()
        for each in shown:
            del each["n_bytes"], each["n_leases"]  # of a server, not of the adapter
        assert shown[0] == shown[1]
        assert [c.digest for c in mine.revisions("x")] == [c.digest for c in others.revisions("x")]
        assert mine.history("x") == others.history("x")
    old = a.revisions("x")[1].digest
    assert b.rollback("x").digest == old
    assert (a.get("x").digest, a.get("x").revision) == (old, 3)


def test_of_two_compare_and_sets_from_two_servers_exactly_one_wins(open_store: OpenStore) -> None:
    a, b = open_store("a"), open_store("b")
    digest = put(a, "x", 1)
    for turn in range(5):
        seeds = (2 + 2 * turn, 3 + 2 * turn)
        start = Barrier(2)

        def change(
            store: AdapterStore, seed: int, start: Barrier = start, seen: str = digest
        ) -> str | None:
            start.wait()
            try:
                return put_if(store, "x", seed, if_match=seen)
            except RevisionConflict:
                return None

        with ThreadPoolExecutor(2) as pool:
            won = [made for made in pool.map(change, (a, b), seeds) if made is not None]
        assert len(won) == 1
        digest = won[0]
        assert a.get("x").digest == b.get("x").digest == digest


def test_of_many_who_make_a_name_exactly_one_does(open_store: OpenStore) -> None:
    stores = [open_store(server) for server in "abcd"]
    start = Barrier(len(stores))

    def make(store: AdapterStore, seed: int) -> str | None:
        start.wait()
        try:
            return put_if(store, "new", seed, replace=False)
        except RevisionConflict:
            return None

    with ThreadPoolExecutor(len(stores)) as pool:
        made = list(pool.map(make, stores, range(1, 5)))
    (winner,) = [digest for digest in made if digest is not None]
    assert {store.get("new").digest for store in stores} == {winner}


def test_a_server_that_was_away_serves_the_newest_digest_at_once(open_store: OpenStore) -> None:
    a, b = open_store("a"), open_store("b")
    put(a, "x", 1)
    b.acquire("x").release()
    b.close()
    newest = [put(a, "x", seed) for seed in (2, 3)][-1]
    put(a, "gone", 4)
    a.delete("gone")
    with open_store("b") as again, again.acquire("x") as lease:
        assert (lease.digest, seed_of(lease.plan)) == (newest, 3)
        assert [card.name for card in again.list()] == ["x"]


def test_a_quota_counts_what_every_server_has_put(open_store: OpenStore) -> None:
    a, b = open_store("a"), open_store("b")
    quota = Quota(max_adapters=2)
    put_if(a, "team:1", 1, quota=quota)
    put_if(b, "team:2", 2, quota=quota)
    put_if(a, "other:3", 3, quota=quota)
    for store in (a, b):
        with pytest.raises(QuotaExceeded):
            put_if(store, "team:3", 3, quota=quota)
    n_bytes = a.get("team:1").n_bytes.disk
    with pytest.raises(QuotaExceeded):
        put_if(b, "team:2", 4, quota=Quota(max_bytes=2 * n_bytes - 1))
    b.delete("team:2")
    put_if(a, "team:3", 3, quota=quota)


def test_a_request_keeps_the_digest_that_a_gateway_resolved(
    open_store: OpenStore, catalogue: Catalogue
) -> None:
    a, b = open_store("a"), open_store("b")
    put(a, "x", 1)
    digest = catalogue.names.read("x").revisions[0].content.digest
    a.delete("x")
    with b.leases.acquire_digest("x", digest) as lease:
        assert (lease.digest, seed_of(lease.plan)) == (digest, 1)
    with pytest.raises(UnknownAdapter):
        b.acquire("x")
    with pytest.raises(UnknownAdapter):
        b.leases.acquire_digest("x", "0" * 64)


def test_a_change_is_judged_by_what_is_so_now_not_by_what_was_known(open_store: OpenStore) -> None:
    """A client may reach another server with each request, faster than names are asked for."""
    slow = CatalogueLimits(refresh_s=3600.0, poll_s=3600.0)
    a, b = open_store("a", limits=slow, n_kept=1), open_store("b", limits=slow, n_kept=1)
    for store in (a, b):
        with pytest.raises(UnknownAdapter):
            store.acquire("x")  # known to be unknown for an hour
    first = put_if(a, "x", 1, replace=False)
    second = put_if(b, "x", 2, if_match=first)
    third = put_if(a, "x", 3, if_match=second, description="third")
    b.edit("x", lambda card: CardEdit(card.description, ("hi",), {}), if_match=third)
    assert (b.get("x").description, b.get("x").examples) == ("third", ("hi",))
    assert a.rollback("x").digest == second
    b.delete("x", if_match=second)
    with pytest.raises(UnknownAdapter):
        a.delete("x")
