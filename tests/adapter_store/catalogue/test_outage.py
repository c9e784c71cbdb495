"""The object store goes away and comes back: nothing wrong is served, nothing hangs."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue import bucket as buckets
from loraplex_adapter_store.catalogue.bucket import Bucket
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.catalogue.catalogue_registry import CatalogueRegistry
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.errors import CatalogueUnavailable, StoreError
from loraplex_adapter_store.names.selector import NameRef
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.test_store import put, seed_of
from tests.support.servers.object_stores import MIDDLE_OF_NOWHERE, S3_SECRET, Switch, s3_environment


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    return Switch(tmp_path / "catalogue", monkeypatch)


class Clock:
    """Goes on from the real one, with which a store starts."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


LIMITS = CatalogueLimits(refresh_s=1.0, stale_s=300.0, poll_s=3600.0)


@contextmanager
def opened(folder: Path, base: BaseSpec, switch: Switch, clock: Clock) -> Iterator[AdapterStore]:
    with AdapterStore(
        folder, base, catalogue=Catalogue(switch.bucket), catalogue_limits=LIMITS
    ) as store:
        registry = store.state.registry
        assert isinstance(registry, CatalogueRegistry)
        registry._freshness._clock = clock
        yield store


def test_known_names_go_on_for_a_while_digests_for_ever_and_changes_are_refused(
    tmp_path: Path, base: BaseSpec, switch: Switch
) -> None:
    clock = Clock()
    with opened(tmp_path / "a", base, switch, clock) as store:
        digest = put(store, "x", 1)
        store.get("x")
        switch.turn(on=False)
        clock.now += 200
        for _ in range(3):
            with store.acquire("x") as lease:
                assert (lease.digest, seed_of(lease.plan)) == (digest, 1)
            clock.now += 2.5
        for change in (
            lambda: put(store, "x", 2),
            lambda: store.delete("x"),
            lambda: store.pin("x"),
            lambda: store.set_expiry("x", 1.0),
        ):
            with pytest.raises(CatalogueUnavailable):
                change()
        with pytest.raises(CatalogueUnavailable):
            store.acquire("never-asked-for")
        clock.now += 200
        with pytest.raises(CatalogueUnavailable):
            store.acquire("x")
        with pytest.raises(CatalogueUnavailable):
            store.list()
        with store.acquire(f"x@{digest}") as lease:
            assert seed_of(lease.plan) == 1
        with store.leases.acquire_digest("x", digest) as lease:
            assert seed_of(lease.plan) == 1
        switch.turn(on=True)
        clock.now += 3
        assert put(store, "x", 2) != digest
        with store.acquire("x") as lease:
            assert seed_of(lease.plan) == 2


def test_a_store_starts_without_its_catalogue_and_serves_when_it_is_back(
    tmp_path: Path, base: BaseSpec, switch: Switch
) -> None:
    clock = Clock()
    with opened(tmp_path / "a", base, switch, clock) as store:
        put(store, "x", 1)
    switch.turn(on=False)
    with opened(tmp_path / "a", base, switch, clock) as store:
        assert store.cards.all() == ()
        with pytest.raises(CatalogueUnavailable):
            store.acquire("x")
        switch.turn(on=True)
        clock.now += 3
        with store.acquire("x") as lease:
            assert seed_of(lease.plan) == 1


def test_readers_do_not_wait_for_an_object_store_that_just_failed(
    tmp_path: Path, base: BaseSpec, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with opened(tmp_path / "a", base, switch, clock) as store:
        put(store, "x", 1)
        switch.turn(on=False)
        clock.now += 10
        store.acquire("x").release()
        monkeypatch.setattr(Bucket, "objects", None)  # whoever asks now gets a TypeError
        for _ in range(100):
            store.acquire("x").release()


def test_an_object_store_that_never_answers_is_given_up(
    base: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_SMALL_TIMEOUT", timedelta(milliseconds=200))
    monkeypatch.setattr(buckets, "_RETRY_TIMEOUT", timedelta(milliseconds=200))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        catalogue = Catalogue.open("s3://adapters/x", base)
        began = time.monotonic()
        with pytest.raises(CatalogueUnavailable):
            catalogue.names.read("x")
        assert time.monotonic() - began < 60  # by default it would be minutes


def test_no_error_and_no_log_holds_a_secret(
    base: BaseSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    for name, value in s3_environment(MIDDLE_OF_NOWHERE).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CatalogueUnavailable) as caught:
        Catalogue.open("s3://adapters/x", base).names.read("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{S3_SECRET}@[bad")
    with pytest.raises(StoreError) as refused:
        Catalogue.open("s3://adapters/x", base).names.read("x")
    for told in (str(caught.value), str(refused.value), caplog.text):
        assert S3_SECRET not in told
        assert "the-key-of" not in told


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:secret99@bucket/x",
        "s3://bucket/x?secret99",
        "ftp://secret99",
        "file://secret99/x",
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(url: str, base: BaseSpec) -> None:
    with pytest.raises(ValueError, match="a catalogue") as caught:
        Catalogue.open(url, base)
    assert "secret99" not in str(caught.value)


def test_waiting_writers_keep_no_reader_from_what_is_known(
    tmp_path: Path, base: BaseSpec, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with opened(tmp_path / "a", base, switch, clock) as store:
        put(store, "x", 1)
        put(store, "y", 2)
        reached, go_on = threading.Event(), threading.Event()
        create = Bucket.create

        def stuck(self: Bucket, key: str, data: bytes) -> bool:
            reached.set()
            assert go_on.wait(60)
            return create(self, key, data)

        monkeypatch.setattr(Bucket, "create", stuck)
        writer = threading.Thread(target=store.set_expiry, args=("y", 9e9))
        writer.start()
        assert reached.wait(60)
        store.acquire("x").release()
        resident = store.leases.acquire_resident(NameRef("x"))
        assert resident is not None
        resident.release()
        assert [card.name for card in store.cards.all()] == ["x", "y"]
        go_on.set()
        writer.join()
        assert store.get("y").expires == 9e9
