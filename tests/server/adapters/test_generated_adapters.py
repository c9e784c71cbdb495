from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import RevisionConflict, UnknownAdapter
from loraplex_adapter_store.selector import Description
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import OutOfDistribution
from loraplex_generation.service import Generator
from loraplex_server.adapters.description import DescriptionGenerator
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from tests.support.architectures import tiny_model
from tests.support.scripted_generator import ScriptedGenerator


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(), "tiny/llama")


@pytest.fixture
def store(spec: BaseSpec, tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store", spec) as store:
        yield store


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _adapters(
    store: AdapterStore, generator: Generator, *, quota: int = 64, clock: Clock | None = None
) -> GeneratedAdapters:
    return GeneratedAdapters(
        store, lambda: generator, ttl_s=60, quota=quota, clock=clock or Clock()
    )


def _names(store: AdapterStore) -> list[str]:
    return [card.name for card in store.list()]


def test_an_order_becomes_a_served_adapter_that_says_where_it_came_from(
    store: AdapterStore, spec: BaseSpec
) -> None:
    card = _adapters(store, ScriptedGenerator(spec)).ensure(AdapterGenerationRequest("to French"))
    assert card.provenance["source"] == "generated"
    assert card.provenance["method"] == "scripted"
    assert card.description == "to French"
    with store.acquire(card.name) as lease:
        assert lease.digest == card.digest


def test_equal_orders_are_made_once(store: AdapterStore, spec: BaseSpec) -> None:
    generator = ScriptedGenerator(spec)
    adapters = _adapters(store, generator)
    assert adapters.ensure(AdapterGenerationRequest("to French")) == adapters.ensure(
        AdapterGenerationRequest("to French")
    )
    assert generator.n_made == 1
    adapters.ensure(AdapterGenerationRequest("to French", seed=1))
    adapters.ensure(AdapterGenerationRequest("to German"))
    assert generator.n_made == 3
    assert len(_names(store)) == 3


def test_many_threads_that_want_the_same_adapter_share_one_flight(
    store: AdapterStore, spec: BaseSpec
) -> None:
    generator = ScriptedGenerator(spec)
    adapters, barrier = _adapters(store, generator), threading.Barrier(8)

    def ask() -> str:
        barrier.wait()
        return adapters.ensure(AdapterGenerationRequest("to French")).digest

    with ThreadPoolExecutor(8) as pool:
        digests = {future.result() for future in [pool.submit(ask) for _ in range(8)]}
    assert len(digests) == 1
    assert generator.n_made == 1


def test_an_unused_adapter_expires_and_a_used_one_does_not(
    store: AdapterStore, spec: BaseSpec
) -> None:
    clock = Clock()
    adapters = _adapters(store, ScriptedGenerator(spec), clock=clock)
    used, unused = (
        adapters.ensure(AdapterGenerationRequest("used")),
        adapters.ensure(AdapterGenerationRequest("unused")),
    )
    clock.now = 40
    adapters.ensure(AdapterGenerationRequest("used"))
    clock.now = 80
    adapters.ensure(AdapterGenerationRequest("another"))
    assert used.name in _names(store)
    assert unused.name not in _names(store)


def test_the_oldest_makes_room_when_the_quota_is_full(store: AdapterStore, spec: BaseSpec) -> None:
    adapters = _adapters(store, ScriptedGenerator(spec), quota=2)
    cards = [adapters.ensure(AdapterGenerationRequest(text)) for text in ("one", "two", "three")]
    assert _names(store) == sorted(card.name for card in cards[1:])


def test_a_request_keeps_an_adapter_that_expires_under_it(
    store: AdapterStore, spec: BaseSpec
) -> None:
    clock = Clock()
    adapters = _adapters(store, ScriptedGenerator(spec), clock=clock)
    card = adapters.ensure(AdapterGenerationRequest("one"))
    with store.acquire(card.name) as lease:
        clock.now = 100
        adapters.ensure(AdapterGenerationRequest("two"))
        assert card.name not in _names(store)
        assert lease.plan.modules


def test_a_name_of_the_callers_stays_and_must_be_free(store: AdapterStore, spec: BaseSpec) -> None:
    clock = Clock()
    adapters = _adapters(store, ScriptedGenerator(spec), clock=clock)
    adapters.ensure(AdapterGenerationRequest("one"), name="mine")
    clock.now = 1e6
    adapters.ensure(AdapterGenerationRequest("two"))
    assert "mine" in _names(store)
    with pytest.raises(RevisionConflict):
        adapters.ensure(AdapterGenerationRequest("three"), name="mine")


def test_one_deleted_by_a_client_is_made_again(store: AdapterStore, spec: BaseSpec) -> None:
    generator = ScriptedGenerator(spec)
    adapters = _adapters(store, generator)
    store.delete(adapters.ensure(AdapterGenerationRequest("one")).name)
    adapters.ensure(AdapterGenerationRequest("one"))
    assert generator.n_made == 2


def test_a_restarted_server_lets_old_ones_expire(store: AdapterStore, spec: BaseSpec) -> None:
    old = _adapters(store, ScriptedGenerator(spec)).ensure(AdapterGenerationRequest("old"))
    clock = Clock()
    adapters = _adapters(store, ScriptedGenerator(spec), clock=clock)
    clock.now = 61
    adapters.ensure(AdapterGenerationRequest("new"))
    with pytest.raises(UnknownAdapter):
        store.get(old.name)


def test_a_refused_description_leaves_nothing_behind(store: AdapterStore, spec: BaseSpec) -> None:
    adapters = _adapters(store, ScriptedGenerator(spec))
    with pytest.raises(OutOfDistribution):
        adapters.ensure(AdapterGenerationRequest("something strange"))
    assert not _names(store)
    assert adapters.ensure(AdapterGenerationRequest("something strange", force=True)).name


def test_the_resolver_gets_a_name_with_its_digest(store: AdapterStore, spec: BaseSpec) -> None:
    wish = DescriptionGenerator(_adapters(store, ScriptedGenerator(spec)))
    resolution = wish.generate(Description("to French"))
    assert resolution.selector is not None
    with store.acquire(resolution.selector) as lease:
        assert lease.plan.modules
    assert resolution.explanation["method"] == "scripted"
    assert resolution.explanation["description"] == "to French"


def test_generated_weights_are_what_the_generator_gave(store: AdapterStore, spec: BaseSpec) -> None:
    generator = ScriptedGenerator(spec)
    card = _adapters(store, generator).ensure(AdapterGenerationRequest("to French"))
    made = generator.generate("to French")
    with store.acquire(card.name) as lease:
        for name, plan in lease.plan.modules.items():
            stem = f"base_model.model.{name}"
            assert plan.a is not None
            assert plan.b is not None
            delta = made.tensors[f"{stem}.lora_B.weight"] @ made.tensors[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(plan.b @ plan.a, 2.0 * delta)
