"""Names, contents, leases and bytes: the life of an adapter in the store."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.contents.content_files import PLAN_FILE
from loraplex_adapter_store.errors import (
    HostTierFull,
    InvalidName,
    InvalidSelector,
    LoadCancelled,
    RevisionConflict,
    StoreClosed,
    StoredAdapterDamaged,
    StoreError,
    UnknownAdapter,
)
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.names.selector import Mixture, parse_selector
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.conftest import (
    MakeAdapter,
    OpenStore,
    evict_least_recently_used,
    plain_lora,
)
from tests.support.adapters.packers import TensorsAside
from tests.support.adapters.plan_executor import plan_logits
from tests.support.bases.tiny_models import PROMPT, tiny_llama


@pytest.fixture
def store(tmp_path: Path, base: BaseSpec, opened: OpenStore) -> Iterator[AdapterStore]:
    with opened(tmp_path / "store", base, allowed_roots=[tmp_path / "adapters"]) as store:
        yield store


Q0 = "model.layers.0.self_attn.q_proj"


def seed_of(plan: AdapterPlan) -> float:
    """The one number all tensors of ``plain_lora(seed)`` consist of; fails on a mixed-up plan."""
    values = {float(v) for tensor in plan.tensors() for v in tensor.unique()}
    assert len(values) == 1, f"contents mixed up: {values}"
    return values.pop()


def put(store: AdapterStore, name: str, seed: int, rank: int = 4) -> str:
    config, tensors = plain_lora(seed, rank)
    return store.put_tensors(name, config, tensors).digest  # type: ignore[arg-type]


def test_a_card_tells_what_was_stored(store: AdapterStore, make_adapter: MakeAdapter) -> None:
    card = store.put_directory(
        "team/de",
        make_adapter(2, rank=6),
        options=PutOptions(description="German", examples=["Hallo"]),
    )
    again = store.get("team/de")
    assert again.to_json() == card.to_json()
    assert (card.revision, card.ranks, card.description) == (1, (6,), "German")
    assert card.report is not None
    assert card.report.scale_rule == "alpha/r = 6/6 = 1"
    assert len(card.report.matched) == 6
    ratio = card.report.modules[Q0].delta_ratio
    weight = tiny_llama().get_submodule(Q0).weight.detach()
    dense = torch.full((32, 6), 2.0) @ torch.full((6, 32), 2.0)
    assert ratio == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-4)
    json.dumps(card.to_json())


def test_the_digest_is_the_content_whatever_the_file_order(
    store: AdapterStore, make_adapter: MakeAdapter
) -> None:
    first = store.put_directory("a", make_adapter(1)).digest
    config, tensors = plain_lora(1)
    reordered = dict(reversed(tensors.items()))
    config["inference_mode"] = True
    second = store.put_tensors("b", config, reordered).digest  # type: ignore[arg-type]
    assert first == second
    assert put(store, "c", seed=2) != first
    assert store.stats().n_digests == 2


@pytest.mark.parametrize(
    "name", ["", "..", "a/../b", "/etc", "a//b", "-a", "a b", "a" * 129, "auto", "a\n", "ä", "a/."]
)
def test_names_that_could_mean_a_path_or_a_word_are_refused(name: str, store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    with pytest.raises(InvalidName):
        store.put_tensors(name, config, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["generate", "train", "Train", "acme:train", "x/pin", "a/b/warm"])
def test_a_name_whose_path_is_another_route_is_refused_with_a_remedy(
    name: str, store: AdapterStore
) -> None:
    config, tensors = plain_lora(1)
    with pytest.raises(InvalidName, match=f"'{name}' is not .* choose ") as refused:
        store.put_tensors(name, config, tensors)  # type: ignore[arg-type]
    assert "routes" in str(refused.value) or "a route of" in str(refused.value)
    assert store.list() == ()


@pytest.mark.parametrize("name", ["pin", "retrain", "train/x", "x/pins", "x/generate"])
def test_a_name_that_only_holds_such_a_word_is_one(name: str, store: AdapterStore) -> None:
    put(store, name, seed=1)
    assert [card.name for card in store.list()] == [name]


def test_an_unknown_name_names_its_neighbours(store: AdapterStore) -> None:
    put(store, "support-de", 1)
    with pytest.raises(UnknownAdapter, match="support-de"):
        store.acquire("support-den")
    with pytest.raises(UnknownAdapter):
        store.get("zzz")


def test_compare_and_set_moves_a_name_once(store: AdapterStore) -> None:
    config, tensors = plain_lora(2)
    first = put(store, "x", 1)
    with pytest.raises(RevisionConflict) as caught:
        store.put_tensors("x", config, tensors, options=PutOptions(if_match="0" * 64))  # type: ignore[arg-type]
    assert caught.value.digest == caught.value.etag == first
    card = store.put_tensors("x", config, tensors, options=PutOptions(if_match=first))  # type: ignore[arg-type]
    assert card.revision == 2
    with pytest.raises(RevisionConflict):
        store.put_tensors("x", config, tensors, options=PutOptions(if_match=first))  # type: ignore[arg-type]
    with pytest.raises(RevisionConflict, match="exists already"):
        store.put_tensors("x", config, tensors, options=PutOptions(replace=False))  # type: ignore[arg-type]
    with pytest.raises(RevisionConflict, match="does not exist"):
        store.put_tensors("new", config, tensors, options=PutOptions(if_match=first))  # type: ignore[arg-type]
    assert [revision for revision, _, _ in store.history("x")] == [1, 2]


def test_a_digest_prefix_means_that_content_or_an_error(store: AdapterStore) -> None:
    digest = put(store, "x", 1)
    with store.acquire(f"x@{digest[:8]}") as lease:
        assert lease.digest == digest
    put(store, "x", 2)
    with pytest.raises(UnknownAdapter, match="@"):
        store.acquire(f"x@{digest[:8]}")


def test_a_lease_keeps_its_content_when_the_name_moves(store: AdapterStore) -> None:
    put(store, "x", 1)
    old = store.acquire("x")
    put(store, "x", 2)
    with store.acquire("x") as new:
        assert (seed_of(old.plan), seed_of(new.plan)) == (1, 2)
        assert (old.revision, new.revision) == (1, 2)
    old.release()


def test_delete_drains_leases_and_reports_the_bytes(store: AdapterStore, tmp_path: Path) -> None:
    retired: list[str] = []
    store.on_retired(retired.append)
    digest = put(store, "x", 1)
    lease = store.acquire("x")
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(store.delete, "x", timeout_s=30)
        while any(card.name == "x" for card in store.list()):
            time.sleep(0)
        with pytest.raises(UnknownAdapter):
            store.acquire("x")
        assert not deleting.done()
        lease.release()
        report = deleting.result(timeout=30)
    assert report.drained
    assert report.n_leases_waited == 1
    assert report.n_bytes_freed.host == lease.plan.n_bytes
    assert report.n_bytes_freed.disk > 0
    assert retired == [digest]
    stats = store.stats()
    assert (stats.disk_bytes, stats.host_bytes_used, stats.n_digests) == (0, 0, 0)
    assert not [p for p in (tmp_path / "store" / "contents").rglob("*") if p.is_file()]


def test_delete_gives_up_waiting_and_the_last_lease_frees_the_rest(store: AdapterStore) -> None:
    retired = threading.Event()
    put(store, "x", 1)
    lease = store.acquire("x")
    store.on_retired(lambda digest: retired.set())
    report = store.delete("x", timeout_s=0.01)
    assert not report.drained
    assert report.n_bytes_freed.host == 0
    assert seed_of(lease.plan) == 1
    lease.release()
    assert retired.wait(10)
    assert store.stats().host_bytes_used == 0


def test_a_content_with_two_names_outlives_one(store: AdapterStore) -> None:
    put(store, "x", 1)
    put(store, "y", 1)
    assert store.delete("x").n_bytes_freed.disk == 0
    with store.acquire("y") as lease:
        assert seed_of(lease.plan) == 1


def test_a_stored_content_gets_a_further_name_without_its_files(store: AdapterStore) -> None:
    digest = put(store, "one", 1)
    named = store.put_stored("two", digest, PutOptions(description="second"))
    if store.is_shared:
        assert named is None
        return
    assert named is not None
    assert (named.digest, named.description, named.revision) == (digest, "second", 1)
    assert store.get("two").to_json() == named.to_json()
    with pytest.raises(RevisionConflict):
        store.put_stored("two", digest, PutOptions(replace=False))
    store.delete("one")
    with store.acquire("two") as lease:
        assert seed_of(lease.plan) == 1
    store.delete("two")
    assert store.put_stored("three", digest, PutOptions()) is None
    assert not store.has_name("three")


def test_releasing_twice_counts_once(store: AdapterStore) -> None:
    put(store, "x", 1)
    first, second = store.acquire("x"), store.acquire("x")
    first.release()
    first.release()
    assert store.get("x").n_leases == 1
    second.release()
    assert store.get("x").n_leases == 0


def test_one_flight_per_digest_however_many_ask(store: AdapterStore) -> None:
    digest = put(store, "x", 1)
    store.state.tier.drop(digest)
    before = store.stats().n_host_loads
    with ThreadPoolExecutor(16) as pool:
        leases = list(pool.map(lambda _: store.acquire("x"), range(64)))
    assert store.stats().n_host_loads == before + 1
    assert len({id(lease.plan) for lease in leases}) == 1
    for lease in leases:
        lease.release()


def test_names_and_contents_survive_a_restart(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base) as store:
        digest = put(store, "x", 1)
        put(store, "x", 3)
        store.pin("x")
        put(store, "gone", 2)
        store.delete("gone")
    with opened(tmp_path / "s", base) as store:
        card = store.get("x")
        assert (card.revision, card.pinned) == (2, True)
        assert store.history("x")[0][1] == digest
        assert put(store, "gone", 5)
        assert store.get("gone").revision == 2, "revision numbers are never reused"
        with store.acquire("x") as lease:
            assert seed_of(lease.plan) == 3


def test_a_directory_belongs_to_one_process(
    store: AdapterStore, base: BaseSpec, tmp_path: Path, opened: OpenStore
) -> None:
    with pytest.raises(StoreError, match="in use"):
        opened(tmp_path / "store", base)


def test_a_closed_store_says_so(tmp_path: Path, base: BaseSpec, opened: OpenStore) -> None:
    store = opened(tmp_path / "s", base)
    put(store, "x", 1)
    lease = store.acquire("x")
    store.close()
    store.close()
    with pytest.raises(StoreClosed):
        store.acquire("x")
    lease.release()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_on_disk_is_noticed_at_load(damage: str, tmp_path: Path, base: BaseSpec) -> None:
    with AdapterStore(tmp_path / "s", base) as store:
        digest = put(store, "x", 1)
        put(store, "y", 2)
    file = tmp_path / "s" / "contents" / digest[:2] / digest / PLAN_FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-5])
    with AdapterStore(tmp_path / "s", base) as store:
        with pytest.raises(StoredAdapterDamaged):
            store.acquire("x")
        assert store.stats().n_leases == 0
        with store.acquire("y") as lease:
            assert seed_of(lease.plan) == 2
        put(store, "x", 3)
        with store.acquire("x") as lease:
            assert seed_of(lease.plan) == 3


# -- host tier


def plan_bytes(rank: int = 4) -> int:
    return 3 * 2 * 32 * rank * 4


def test_the_host_budget_holds_and_the_least_valuable_leaves(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    budget = 3 * plan_bytes()
    with opened(tmp_path / "s", base, host_bytes=budget) as store:
        evict_least_recently_used(store)
        for seed in range(1, 7):
            put(store, f"a{seed}", seed)
        for seed in (1, 2, 3, 1, 4, 1, 5, 6):
            with store.acquire(f"a{seed}") as lease:
                assert seed_of(lease.plan) == seed
            assert store.stats().host_bytes_used <= budget
        assert store.get("a1").n_bytes.host > 0
        assert store.get("a2").n_bytes.host == 0
        assert store.stats().n_host_evictions > 0


def test_leased_and_pinned_plans_are_never_evicted(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    limits = StoreLimits(host_wait_s=0.05)
    with opened(tmp_path / "s", base, host_bytes=2 * plan_bytes(), limits=limits) as store:
        for seed in range(1, 5):
            put(store, f"a{seed}", seed)
        store.pin("a1")
        lease = store.acquire("a2")
        with pytest.raises(HostTierFull, match="leased or pinned"):
            store.acquire("a3")
        assert store.get("a1").n_bytes.host
        lease.release()
        store.acquire("a3").release()
        assert store.get("a1").n_bytes.host
        store.unpin("a1")
        store.acquire("a4").release()
        store.acquire("a3").release()
        store.acquire("a2").release()
        assert store.stats().host_bytes_used <= 2 * plan_bytes()


def test_a_load_waits_for_room_that_a_lease_gives_back(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, host_bytes=plan_bytes()) as store:
        put(store, "a1", 1)
        put(store, "a2", 2)
        lease = store.acquire("a1")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.acquire, "a2")
            lease.release()
            with waiting.result(timeout=20) as second:
                assert seed_of(second.plan) == 2


def test_who_has_left_waits_for_no_room(tmp_path: Path, base: BaseSpec, opened: OpenStore) -> None:
    limits = StoreLimits(host_wait_s=600.0)
    with opened(tmp_path / "s", base, host_bytes=plan_bytes(), limits=limits) as store:
        put(store, "a1", 1)
        put(store, "a2", 2)
        left = threading.Event()
        with store.acquire("a1"), ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.acquire, "a2", left)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            left.set()
            with pytest.raises(LoadCancelled):
                waiting.result(timeout=20)
            with pytest.raises(LoadCancelled):  # nor does a load begin that had to queue till then
                store.acquire("a1", left)


def test_what_pins_leave_no_room_for_is_refused_at_once(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    limits = StoreLimits(host_wait_s=600.0)
    with opened(tmp_path / "s", base, host_bytes=2 * plan_bytes() - 1, limits=limits) as store:
        put(store, "a1", 1)
        put(store, "a2", 2)
        store.pin("a1")
        with ThreadPoolExecutor(1) as pool, pytest.raises(HostTierFull, match="unpin"):
            pool.submit(store.acquire, "a2").result(timeout=20)


def test_a_plan_larger_than_the_tier_is_refused_at_once(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, host_bytes=plan_bytes() - 1) as store:
        put(store, "x", 1)
        started = time.monotonic()
        with pytest.raises(HostTierFull):
            store.acquire("x")
        assert time.monotonic() - started < 5


# -- mixtures


def test_a_mixture_is_the_weighted_sum_of_its_parts(store: AdapterStore) -> None:
    model = tiny_llama()
    torch.manual_seed(0)
    config, _ = plain_lora(1)
    parts = []
    for name in ("a", "b"):
        tensors = {key: torch.randn_like(t) * 0.3 for key, t in plain_lora(1)[1].items()}
        store.put_tensors(name, config, tensors)  # type: ignore[arg-type]
        parts.append(tensors)
    selector = parse_selector([{"name": "a", "weight": 0.7}, {"name": "b", "weight": -0.4}])
    with store.acquire(selector) as lease:
        got = plan_logits(model, lease.plan, PROMPT)
    with torch.no_grad():
        for layer in range(3):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            weight = model.get_submodule(f"model.layers.{layer}.self_attn.q_proj").weight
            for tensors, w in zip(parts, (0.7, -0.4), strict=True):
                weight += w * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        expected = model(input_ids=PROMPT).logits
    assert (got - expected).abs().max() < 1e-4


def test_mixtures_are_cached_by_content_and_leave_with_their_parts(store: AdapterStore) -> None:
    put(store, "a", 1)
    put(store, "b", 2)
    selector = parse_selector([{"name": "a", "weight": 1}, {"name": "b", "weight": 2}])
    swapped = parse_selector([{"name": "b", "weight": 2}, {"name": "a", "weight": 1}])
    with store.acquire(selector) as first, store.acquire(swapped) as second:
        assert first.plan is second.plan
        assert first.plan.modules[Q0].rank == 8
    retired: list[str] = []
    store.on_retired(retired.append)
    store.delete("a")
    assert first.digest in retired
    store.delete("b")
    assert store.stats().host_bytes_used == 0


def test_a_mixture_does_not_bring_its_parts_to_host_memory(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base) as store:
        put(store, "a", 1)
        put(store, "b", 2)
    selector = parse_selector([{"name": "a", "weight": 1}, {"name": "b", "weight": 2}])
    with opened(tmp_path / "s", base) as store:
        for _ in range(2):
            with store.acquire(selector) as lease:
                assert store.stats().host_bytes_used == lease.plan.n_bytes
        assert store.stats().n_host_loads == 1
        assert store.stats().n_leases == 0


def test_a_part_that_is_deleted_while_its_mixture_is_built_stays_until_then(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    building, go_on = threading.Event(), threading.Event()

    class Waits(TensorsAside):
        def prepare(self, plan: AdapterPlan) -> AdapterPlan:
            if plan.digest not in (a, b):
                building.set()
                assert go_on.wait(10)
            return super().prepare(plan)

    a = b = ""
    with opened(tmp_path / "s", base) as store:
        a, b = put(store, "a", 1), put(store, "b", 2)
    selector = parse_selector([{"name": "a", "weight": 1}, {"name": "b", "weight": 2}])
    with (
        opened(tmp_path / "s", base, engine=EngineHooks(Waits())) as store,
        ThreadPoolExecutor(1) as pool,
    ):
        mixing = pool.submit(store.acquire, selector)
        assert building.wait(10)
        report = store.delete("a", timeout_s=0.01)
        assert not report.drained
        assert store.state.files.path(a).exists()
        with pytest.raises(UnknownAdapter):
            store.acquire(selector)
        go_on.set()
        mixing.result().release()
    assert not store.state.files.path(a).exists()
    assert store.state.files.path(b).exists()


def test_what_cannot_be_mixed_exactly_says_why(store: AdapterStore) -> None:
    config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.k_proj.ia3_l": torch.full((16, 1), 2.0)
        for i in range(3)
    }
    store.put_tensors("ia3", config, tensors)  # type: ignore[arg-type]
    put(store, "a", 1)
    with pytest.raises(InvalidSelector, match=r"out_scale of .*k_proj"):
        store.acquire(parse_selector([{"name": "a"}, {"name": "ia3"}]))
    assert store.stats().n_leases == 0


def test_descriptions_and_auto_are_resolved_elsewhere(store: AdapterStore) -> None:
    for value in ("auto", {"description": "answer in German"}):
        with pytest.raises(InvalidSelector, match="resolved"):
            store.acquire(parse_selector(value))


# -- under load


def test_the_same_name_under_load_is_wholly_old_or_wholly_new(store: AdapterStore) -> None:
    put(store, "x", 1)
    stop = threading.Event()
    seen: list[list[tuple[int, float]]] = [[] for _ in range(4)]

    def read(number: int) -> None:
        while not stop.is_set():
            with store.acquire("x") as lease:
                seen[number].append((lease.revision, seed_of(lease.plan)))

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read, number) for number in range(4)]
        for seed in range(2, 30):
            put(store, "x", seed, rank=1 + seed % 5)
        stop.set()
        for reader in readers:
            reader.result(timeout=60)
    for reads in seen:
        assert reads == sorted(reads), "a reader never goes back in time"
        assert all(seed == revision for revision, seed in reads)


def test_random_operations_from_many_threads_keep_the_books(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, host_bytes=4 * plan_bytes(8)) as store:

        def work(worker: int) -> None:
            generator = torch.Generator().manual_seed(worker)
            for _ in range(40):
                action, which = (int(v) for v in torch.randint(0, 6, (2,), generator=generator))
                name = f"n{which}"
                try:
                    if action == 0:
                        put(store, name, seed=which + 1, rank=1 + action)
                    elif action == 1:
                        store.delete(name, timeout_s=5)
                    elif action == 2:
                        store.pin(name)
                        store.unpin(name)
                    else:
                        with store.acquire(name) as lease:
                            assert seed_of(lease.plan) == which + 1
                except UnknownAdapter:
                    pass

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, worker) for worker in range(4)]:
                done.result(timeout=60)
        for card in store.list():
            store.delete(card.name)
        stats = store.stats()
        assert (stats.n_leases, stats.host_bytes_used, stats.disk_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        ("a/b@12ab", "a/b@12ab"),
        ({"name": "a", "digest": "abcd1234"}, "a@abcd1234"),
        ([{"name": "a", "weight": 0.5}, {"name": "b"}], "0.5*a + 1*b"),
    ],
)
def test_selectors_parse(value: object, text: str) -> None:
    assert str(parse_selector(value)) == text


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {},
        [],
        {"name": 3},
        {"nam": "a"},
        "a@xyz",
        "a@12",
        {"name": "a@1234", "digest": "1234"},
        [{"name": "a", "weight": "1"}],
        [{"name": "a", "weight": True}],
        [{"name": "a", "weight": 1e9}],
        [{"name": "a"}] * 17,
        ["a"],
        {"description": ""},
        {"description": "x" * 3000},
        {"description": "x", "method": "magic"},
    ],
)
def test_selectors_that_mean_nothing_are_explained(value: object) -> None:
    with pytest.raises((InvalidSelector, InvalidName)):
        parse_selector(value)


def test_a_tenant_that_loads_many_adapters_leaves_the_others_share_in_memory(
    tmp_path: Path, base: BaseSpec, make_adapter: MakeAdapter, opened: OpenStore
) -> None:
    budget = 4 * plan_bytes()
    with opened(tmp_path / "s", base, host_bytes=budget) as store:
        evict_least_recently_used(store)
        kept = [f"acme:{seed}" for seed in (1, 2)]
        many = [f"umbra:{seed}" for seed in range(3, 9)]
        for seed, name in enumerate([*kept, *many], start=1):
            store.put_directory(name, make_adapter(seed))
        for name in kept:
            store.acquire(name).release()
        for name in many * 2:
            store.acquire(name).release()
        in_memory = {card.name for card in store.list() if card.n_bytes.host}
        assert in_memory == {*kept, *many[-2:]}
        for name in kept:
            store.delete(name)
        for name in many:  # alone, a tenant has all of it
            store.acquire(name).release()
        assert {card.name for card in store.list() if card.n_bytes.host} == set(many[-4:])


def test_a_tenants_mixtures_of_shared_adapters_leave_the_operators_in_memory(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, host_bytes=4 * plan_bytes()) as store:
        evict_least_recently_used(store)
        for seed, name in enumerate("ab", start=1):
            put(store, name, seed)
            store.acquire(name).release()
        for weight in range(2, 9):
            store.acquire(mixture_of("a", weight), tenant="acme").release()
        assert {card.name for card in store.list() if card.n_bytes.host} == {"a", "b"}


def test_a_mixture_that_left_memory_is_forgotten(
    tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    with opened(tmp_path / "s", base, host_bytes=4 * plan_bytes()) as store:
        evict_least_recently_used(store)
        put(store, "a", 1)
        retired: list[str] = []
        store.on_retired(retired.append)
        used = mixture_of("a", 2)
        with store.acquire(used) as lease:
            made = [lease.digest]
            for weight in range(3, 12):
                with store.acquire(mixture_of("a", weight)) as other:
                    made.append(other.digest)
            assert retired == made[1:-3]  # four fit: the one in use, and the last three
        again = store.acquire(mixture_of("a", 3))
        assert again.digest == made[1]
        again.release()
        store.delete("a")
        assert store.stats().host_bytes_used == 0
        assert set(retired) > set(made)


def mixture_of(name: str, weight: float) -> Mixture:
    selector = parse_selector([{"name": name, "weight": weight}])
    assert isinstance(selector, Mixture)
    return selector
