import contextlib
import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.errors import RevisionConflict
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.selector import Description
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import OutOfDistribution
from loraplex_generation.generated import Generator
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.adapters.learning.generated_adapters import (
    GeneratedAdapters,
)
from loraplex_server.adapters.resolving.described_adapters import DescribedAdapters
from loraplex_server.settings.api_keys import EVERY_ADAPTER, GENERATED
from loraplex_server.tenant_shares import TenantThreads
from tests.support.bases.architectures import tiny_model
from tests.support.scripted_generator import ScriptedGenerator


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(), "tiny/llama")


@pytest.fixture
def store(spec: BaseSpec, tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store", spec) as store:
        yield store


START = 1.7e9  # seconds since the epoch


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


Make = Callable[..., GeneratedAdapters]


@pytest.fixture
def make(store: AdapterStore) -> Iterator[Make]:
    """Makes the generated adapters of ``store``; they are closed before it."""
    with contextlib.ExitStack() as closing:

        def make(
            generator: Generator, *, clock: Clock | None = None, **options: Any
        ) -> GeneratedAdapters:
            clock = clock or Clock()
            made = GeneratedAdapters(store, lambda: generator, ttl_s=60, clock=clock, **options)
            closing.callback(made.close)
            return made

        yield make


def _names(store: AdapterStore) -> list[str]:
    return [card.name for card in store.list()]


def test_adapters_of_one_key_share_a_content_whose_files_are_written_once(
    make: Make, store: AdapterStore, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the multi-task adapter do, which differ in their system prompts."""
    weights = ScriptedGenerator(spec).generate(AdapterGenerationRequest("any"))
    written: list[str] = []
    put_tensors = store.put_tensors
    monkeypatch.setattr(
        store,
        "put_tensors",
        lambda name, *given, **options: (
            written.append(name) or put_tensors(name, *given, **options)
        ),
    )
    generated = make(ScriptedGenerator(spec))

    def ensure(description: str) -> AdapterCard:
        own = dataclasses.replace(weights, key="one", system_prompt=description)
        return generated.ensure(AdapterGenerationRequest(description), make=lambda: own)

    first, second = ensure("to French"), ensure("to German")
    assert written == [first.name]
    assert first.digest == second.digest
    assert [card.defaults["system_prompt"] for card in (first, second)] == [
        "to French",
        "to German",
    ]
    for card in (first, second):
        store.delete(card.name)
    assert ensure("to Polish").name in written  # nothing was left to point at


def test_an_order_becomes_a_served_adapter_that_says_where_it_came_from(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    card = make(ScriptedGenerator(spec)).ensure(AdapterGenerationRequest("to French"))
    assert card.provenance["source"] == "generated"
    assert card.provenance["method"] == "scripted"
    assert card.description == "to French"
    with store.acquire(card.name) as lease:
        assert lease.digest == card.digest


def test_equal_orders_are_made_once(make: Make, store: AdapterStore, spec: BaseSpec) -> None:
    generator = ScriptedGenerator(spec)
    adapters = make(generator)
    assert adapters.ensure(AdapterGenerationRequest("to French")) == adapters.ensure(
        AdapterGenerationRequest("to French")
    )
    assert generator.n_made == 1
    adapters.ensure(AdapterGenerationRequest("to French", seed=1))
    adapters.ensure(AdapterGenerationRequest("to German"))
    assert generator.n_made == 3
    assert len(_names(store)) == 3


def test_what_was_made_for_another_base_is_made_anew(tmp_path: Path, spec: BaseSpec) -> None:
    other = BaseSpec.of(tiny_model(seed=1), "tiny/llama")
    request = AdapterGenerationRequest("to French")
    for base in (spec, other):
        with AdapterStore(tmp_path / "state", base) as store:
            generator = ScriptedGenerator(base)
            adapters = GeneratedAdapters(store, lambda g=generator: g)  # type: ignore[misc]
            card = adapters.ensure(request)
            adapters.close()
            assert (card.base_fingerprint, generator.n_made) == (base.fingerprint, 1)
            store.acquire(card.name).release()


def test_many_threads_that_want_the_same_adapter_share_one_flight(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    generator = ScriptedGenerator(spec)
    adapters, barrier = make(generator), threading.Barrier(8)

    def ask() -> str:
        barrier.wait()
        return adapters.ensure(AdapterGenerationRequest("to French")).digest

    with ThreadPoolExecutor(8) as pool:
        digests = {future.result() for future in [pool.submit(ask) for _ in range(8)]}
    assert len(digests) == 1
    assert generator.n_made == 1


def test_each_use_starts_the_life_of_an_unnamed_adapter_anew(make: Make, spec: BaseSpec) -> None:
    clock = Clock()
    adapters = make(ScriptedGenerator(spec), clock=clock)
    assert adapters.ensure(AdapterGenerationRequest("used")).expires == START + 60
    clock.now += 40
    assert adapters.ensure(AdapterGenerationRequest("used")).expires == START + 100
    assert adapters.stats.n_reused == 1


def test_uses_soon_after_another_write_nothing_to_the_catalogue(
    spec: BaseSpec, tmp_path: Path
) -> None:
    """Each write is an object that stays."""
    shared, clock, used = tmp_path / "catalogue", Clock(), AdapterGenerationRequest("used")

    def n_objects() -> int:
        return sum(path.is_file() for path in shared.rglob("*"))

    shared.mkdir()
    catalogue = Catalogue.open(shared.as_uri(), spec)
    with AdapterStore(tmp_path / "store", spec, catalogue=catalogue) as store:
        adapters = GeneratedAdapters(store, lambda: ScriptedGenerator(spec), ttl_s=60, clock=clock)
        with contextlib.closing(adapters):
            adapters.ensure(used)
            n_written = n_objects()
            clock.now += 3
            assert adapters.ensure(used).expires == START + 60
            assert n_objects() == n_written
            clock.now += 1
            assert adapters.ensure(used).expires == START + 64
            assert n_objects() == n_written + 1
            assert adapters.ensure(used, ttl_s=6).expires == START + 10  # a shorter life, too


def test_an_adapter_goes_when_its_time_has_come_without_anybody_asking(
    store: AdapterStore, spec: BaseSpec
) -> None:
    gone: queue.SimpleQueue[str] = queue.SimpleQueue()
    store.on_retired(gone.put)
    adapters = GeneratedAdapters(store, lambda: ScriptedGenerator(spec))  # on the real clock
    kept = adapters.ensure(AdapterGenerationRequest("kept"), name="kept")
    late = adapters.ensure(AdapterGenerationRequest("late"), name="late", ttl_s=0.3)
    early = adapters.ensure(AdapterGenerationRequest("early"), ttl_s=0.1)
    assert {gone.get(timeout=30), gone.get(timeout=30)} == {early.digest, late.digest}
    assert _names(store) == [kept.name]
    adapters.close()


def test_one_that_expired_while_the_server_was_down_goes_at_the_start(
    store: AdapterStore, spec: BaseSpec
) -> None:
    gone: queue.SimpleQueue[str] = queue.SimpleQueue()
    store.on_retired(gone.put)
    adapters = GeneratedAdapters(store, lambda: ScriptedGenerator(spec), clock=Clock())
    old = adapters.ensure(AdapterGenerationRequest("old"))  # in 2023
    adapters.close()
    restarted = GeneratedAdapters(store, lambda: ScriptedGenerator(spec))
    assert gone.get(timeout=30) == old.digest
    restarted.close()


def test_the_oldest_makes_room_when_the_quota_is_full(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    clock = Clock()
    adapters, cards = make(ScriptedGenerator(spec), quota=2, clock=clock), []
    for text in ("one", "two", "three"):
        cards.append(adapters.ensure(AdapterGenerationRequest(text)))
        clock.now += 1
    assert _names(store) == sorted(card.name for card in cards[1:])


def test_one_that_a_job_makes_better_is_not_what_makes_room_and_outlives_the_job(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    clock = Clock()
    adapters = make(ScriptedGenerator(spec), quota=2, clock=clock)
    learning = {"refinement": {"finished": False, "job": "job-1"}}
    kept = adapters.ensure(
        AdapterGenerationRequest("learns"), provenance=learning, ttl_s=1, busy_s=9
    )
    assert kept.expires == START + 10
    adapters.ensure(AdapterGenerationRequest("one"))
    last = adapters.ensure(AdapterGenerationRequest("two"))
    assert _names(store) == sorted([kept.name, last.name])


def test_a_draft_whose_job_a_restart_cut_off_makes_room_as_others_do(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    adapters = make(ScriptedGenerator(spec), quota=3, runs={"job-2"}.__contains__)
    for number in (1, 2):
        learning = {"refinement": {"finished": False, "job": f"job-{number}"}}
        request = AdapterGenerationRequest(f"learns {number}")
        adapters.ensure(request, provenance=learning, ttl_s=number)
    one = adapters.ensure(AdapterGenerationRequest("one"))
    two = adapters.ensure(AdapterGenerationRequest("two"))
    runs = GeneratedAdapters.unnamed(AdapterGenerationRequest("learns 2"), "")
    assert _names(store) == sorted([runs, one.name, two.name])


def test_a_request_keeps_an_adapter_that_expires_under_it(
    store: AdapterStore, spec: BaseSpec
) -> None:
    adapters = GeneratedAdapters(store, lambda: ScriptedGenerator(spec), clock=Clock())
    card = adapters.ensure(AdapterGenerationRequest("one"))
    adapters.close()
    with store.acquire(card.name) as lease:
        assert store.expire(START + 3601) == (card.name,)
        assert card.name not in _names(store)
        assert lease.plan.modules


def test_a_name_of_the_callers_stays_and_must_be_free(make: Make, spec: BaseSpec) -> None:
    adapters = make(ScriptedGenerator(spec))
    card = adapters.ensure(AdapterGenerationRequest("one"), name="mine")
    assert card.expires is None
    with pytest.raises(RevisionConflict):
        adapters.ensure(AdapterGenerationRequest("three"), name="mine")


def test_one_deleted_by_a_client_is_made_again(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    generator = ScriptedGenerator(spec)
    adapters = make(generator)
    store.delete(adapters.ensure(AdapterGenerationRequest("one")).name)
    adapters.ensure(AdapterGenerationRequest("one"))
    assert generator.n_made == 2


def test_unnamed_ones_of_a_version_that_kept_no_expiry_get_one(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    made = ScriptedGenerator(spec).generate(AdapterGenerationRequest("old"))
    config = json.loads(json.dumps(made.config))
    store.put_tensors(f"{GENERATED}abc", config, made.tensors)
    make(ScriptedGenerator(spec))
    assert store.get(f"{GENERATED}abc").expires == START + 60


def test_a_refused_description_leaves_nothing_behind(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    adapters = make(ScriptedGenerator(spec))
    with pytest.raises(OutOfDistribution):
        adapters.ensure(AdapterGenerationRequest("something strange"))
    assert not _names(store)
    assert adapters.ensure(AdapterGenerationRequest("something strange", force=True)).name


def test_a_refused_description_takes_no_name_when_the_quota_is_full(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    adapters = make(ScriptedGenerator(spec), quota=1)
    kept = adapters.ensure(AdapterGenerationRequest("one")).name
    with pytest.raises(OutOfDistribution):
        adapters.ensure(AdapterGenerationRequest("something strange"))
    assert _names(store) == [kept]


@pytest.mark.anyio
async def test_a_description_resolves_to_a_name_with_its_digest(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    threads = TenantThreads("generation", 1, 1)
    descriptions = DescribedAdapters(make(ScriptedGenerator(spec)), threads)
    resolution = await descriptions.resolve(Description("to French"), EVERY_ADAPTER)
    threads.close()
    assert resolution.adapter is not None
    with store.acquire(resolution.adapter) as lease:
        assert lease.plan.modules
    assert resolution.explanation["method"] == "scripted"
    assert resolution.explanation["description"] == "to French"


def test_generated_weights_are_what_the_generator_gave(
    make: Make, store: AdapterStore, spec: BaseSpec
) -> None:
    generator = ScriptedGenerator(spec)
    card = make(generator).ensure(AdapterGenerationRequest("to French"))
    made = generator.generate(AdapterGenerationRequest("to French"))
    with store.acquire(card.name) as lease:
        for name, plan in lease.plan.modules.items():
            stem = f"base_model.model.{name}"
            assert plan.a is not None
            assert plan.b is not None
            delta = made.tensors[f"{stem}.lora_B.weight"] @ made.tensors[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(plan.b @ plan.a, 2.0 * delta)
