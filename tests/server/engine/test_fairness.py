"""Fairness across tenants: the bound of ``wait_queue``, shares by weight, nothing lost.

The loop of steps is simulated; scheduler, queue and KV cache are the real ones.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.requests.client import TenantShare
from loraplex_server.engine.requests.request import Request, RequestStatus
from loraplex_server.engine.scheduling.wait_queue import QUANTUM
from tests.support.scheduler_loop import SchedulerLoop

_SIZE = st.tuples(st.integers(1, 40), st.integers(1, 200))  # prompt, answer


def _is_done(request: Request) -> bool:
    return request.status is RequestStatus.FINISHED


def _run_until_done(loop: SchedulerLoop, request: Request, limit: int = 5000) -> int:
    n_steps = 0
    while not _is_done(request):
        loop.step()
        n_steps += 1
        assert n_steps < limit
    return n_steps


def _served(requests: list[Request]) -> dict[str, int]:
    """Answer tokens by tenant."""
    served: Counter[str] = Counter()
    for request in requests:
        served[request.source.share.tenant] += request.n_output
    return served


@given(
    floods=st.lists(st.lists(_SIZE, min_size=1, max_size=25), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 1.0, 7.0]), min_size=5, max_size=5),
    n_adapters=st.integers(1, 8),
    n_rows=st.integers(5, 12),
    n_step_tokens=st.integers(1, 64),
    n_before=st.integers(0, 40),
    small=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=6),
    n_spare_pages=st.integers(0, 80),
    n_spare_places=st.integers(0, 8),
)
@settings(max_examples=60, deadline=None)
def test_a_tenant_without_a_row_waits_at_most_as_many_steps_as_there_are_tenants(
    floods: list[list[tuple[int, int]]],
    weights: list[float],
    n_adapters: int,
    n_rows: int,
    n_step_tokens: int,
    n_before: int,
    small: list[tuple[int, int]],
    n_spare_pages: int,
    n_spare_places: int,
) -> None:
    n_tenants = len(floods) + 1
    pages_of_one = -(-240 // 4) + 1
    loop = SchedulerLoop(
        n_pages=n_tenants * pages_of_one + n_spare_pages,
        max_batch=n_rows,
        max_step=n_step_tokens,
        n_slots=n_tenants + n_spare_places,
    )
    for number, flood in enumerate(floods):
        share = TenantShare(f"flood{number}", weights[number])
        for index, (n_prompt, max_tokens) in enumerate(flood):
            adapter = f"f{number}/{index % n_adapters}"
            loop.add(f"{number}-{index}", n_prompt, max_tokens, adapter, share)
    for _ in range(n_before):
        loop.step()
    for index, (n_prompt, max_tokens) in enumerate(small):
        share = TenantShare("small", weights[-1])
        request = loop.add(f"small{index}", n_prompt, max_tokens, "small", share)
        _run_until_done(loop, request)
        assert request.n_steps_queued <= n_tenants


@pytest.mark.parametrize("n_slots", [1, 3, 100])
@pytest.mark.parametrize("n_pages", [70, 400])
def test_a_small_request_beside_a_flood_that_holds_everything(n_pages: int, n_slots: int) -> None:
    """Rows, pages and places of adapters: with one place only, the flood must first be ahead."""
    loop = SchedulerLoop(n_pages=n_pages, max_batch=8, max_step=16, n_slots=n_slots)
    flood = TenantShare("flood")
    for index in range(60):
        loop.add(f"f{index}", 8, 240, f"a{index % n_slots}", flood)
    for _ in range(20):
        loop.step()
    assert loop.scheduler.running
    small = loop.add("small", 4, 1, "mine", TenantShare("small"))
    n_steps = _run_until_done(loop, small)
    if n_slots == 1:
        assert n_steps <= QUANTUM / 2 + 2
    else:
        assert n_steps <= 2
        assert small.n_steps_queued <= 2


@pytest.mark.parametrize(
    ("n_pages", "max_batch"), [(400, 2), (70, 8)], ids=["rows are short", "pages are short"]
)
def test_no_row_is_taken_back_before_the_adapter_it_is_for_has_come(
    n_pages: int, max_batch: int
) -> None:
    loop = SchedulerLoop(n_pages=n_pages, max_batch=max_batch, max_step=32)
    for index in range(20):
        loop.add(f"f{index}", 8, 240, "theirs", TenantShare("flood"))
    for _ in range(80):
        loop.step()
    n_before = loop.scheduler.n_fairness_preemptions
    loop.adapters.loading.add("mine")
    small = loop.add("small", 40, 1, "mine", TenantShare("small"))
    loop.step()
    assert loop.scheduler.n_fairness_preemptions == n_before
    loop.adapters.loading.clear()
    assert _run_until_done(loop, small) <= 3
    assert loop.scheduler.n_fairness_preemptions > n_before

    n_before = loop.scheduler.n_fairness_preemptions
    loop.adapters.broken.add("broken")
    loop.add("failing", 40, 1, "broken", TenantShare("small"))
    loop.step()
    assert loop.failed == ["failing"]
    assert loop.scheduler.n_fairness_preemptions == n_before


@pytest.mark.parametrize("tenants", [("one", "one"), ("one", "two")])
def test_rows_of_a_pinned_adapter_are_not_taken_back_for_its_place(
    tenants: tuple[str, str],
) -> None:
    loop = SchedulerLoop(n_pages=200, n_slots=2)
    loop.adapters.pinned.add("pinned")
    on_pinned = loop.add("on pinned", 12, 240, "pinned", TenantShare(tenants[0]))
    on_other = loop.add("on other", 4, 240, "other", TenantShare(tenants[1]))
    loop.step()
    small = loop.add("small", 4, 1, "mine", TenantShare("small"))
    # Of two tenants with a row each, one must first be ahead.
    assert _run_until_done(loop, small) <= (QUANTUM if "two" in tenants else 2)
    assert (on_pinned.n_preempted, on_other.n_preempted) == (0, 1)


def test_without_keys_a_long_flood_is_waited_for() -> None:
    """What the bound is worth: the same requests as of one tenant."""
    loop = SchedulerLoop(n_pages=400, max_batch=8)
    for index in range(60):
        loop.add(f"f{index}", 8, 240, f"a{index}")
    for _ in range(20):
        loop.step()
    small = loop.add("small", 4, 1, "mine")
    _run_until_done(loop, small)
    assert small.n_steps_queued > 200


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_two_floods_are_served_by_weight_whoever_came_first(weight: float) -> None:
    loop = SchedulerLoop(n_pages=600, max_batch=8, max_step=64)
    requests = []
    first, second = TenantShare("first"), TenantShare("second", weight)
    for index in range(300):  # short and long ones: equal rows would not do
        requests.append(loop.add(f"f{index}", 8, 60, f"a{index % 3}", first))
    for _ in range(10):
        loop.step()
    for index in range(600):
        requests.append(loop.add(f"s{index}", 24, 6, f"b{index % 3}", second))
    before = loop.scheduler.waiting.counter(requests[299])
    for _ in range(600):
        loop.step()
    ahead = loop.scheduler.waiting.counter(requests[299]) - loop.scheduler.waiting.counter(
        requests[-1]
    )
    # as in VTC's theorem: bounded by what a batch can hold, not growing with time
    assert abs(ahead) <= QUANTUM + 8 * (24 + 2 * 60)
    assert loop.scheduler.waiting.counter(requests[299]) - before > 3 * abs(ahead)


def test_who_was_away_has_saved_nothing_up() -> None:
    loop = SchedulerLoop(max_batch=1)
    here, back = TenantShare("here"), TenantShare("back")
    loop.add("once", 4, 1, share=back)
    for _ in range(3):
        loop.step()
    requests = [loop.add(f"h{index}", 4, 50, share=here) for index in range(40)]
    for _ in range(400):
        loop.step()
    requests += [loop.add(f"b{index}", 4, 50, share=back) for index in range(40)]
    before = _served(requests)
    for _ in range(1000):
        loop.step()
    after = _served(requests)
    gained = [after[name] - before[name] for name in ("here", "back")]
    assert sum(gained) > 900
    assert abs(gained[0] - gained[1]) <= QUANTUM


def test_more_tenants_than_rows_take_turns() -> None:
    loop = SchedulerLoop(n_pages=600, max_batch=2, max_step=64)
    requests = [loop.add(f"r{n}", 4, 240, share=TenantShare(f"t{n}")) for n in range(8)]
    requests += [loop.add(f"more{n}", 4, 240, share=TenantShare(f"t{n}")) for n in range(8)]
    for _ in range(int(4 * (QUANTUM / 2 + 2))):
        loop.step()
    assert all(request.n_output for request in requests[:8])
    assert max(request.n_output for request in requests) < 240


def test_rows_of_a_tenant_are_capped_and_others_go_on() -> None:
    loop = SchedulerLoop(max_batch=4)
    capped = TenantShare("capped", max_running=1)
    for index in range(5):
        loop.add(f"c{index}", 4, 8, share=capped)
    other = loop.add("other", 4, 8, share=TenantShare("other"))
    n_most = 0
    while not _is_done(other):
        loop.step()
        rows = Counter(r.source.share.tenant for r in loop.scheduler.running)
        n_most = max(n_most, rows["capped"])
    assert n_most == 1
    for _ in range(60):
        loop.step()
    assert len(loop.admitted) == 6


def test_tokens_that_were_served_once_are_not_charged_again() -> None:
    """A preempted row that is computed again costs its tenant nothing."""
    loop = SchedulerLoop(max_batch=2, n_pages=200)
    flood = TenantShare("flood")
    rows = [loop.add(f"f{n}", 8, 100, share=flood) for n in range(2)]
    for _ in range(5):
        loop.step()
    for index in range(10):
        _run_until_done(loop, loop.add(f"s{index}", 4, 1, share=TenantShare("small")))
    assert rows[1].n_preempted > 0
    known = [row.n_charged for row in rows]
    costs = [
        8 + 8 * 4 / 1024 + sum(2 + 2 * (7.5 + k) / 1024 for k in range(1, n + 1)) for n in known
    ]
    assert loop.scheduler.waiting.counter(rows[0]) == pytest.approx(sum(costs))


@given(
    sizes=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 40),
            st.sampled_from(["", "a", "b", "c"]),
            st.integers(0, 3),  # tenant
        ),
        min_size=1,
        max_size=14,
    ),
    n_pages=st.integers(21, 50),
    max_batch=st.integers(1, 5),
    max_step=st.integers(1, 24),
    n_slots=st.integers(1, 4),
    arrivals=st.lists(st.integers(0, 60), min_size=14, max_size=14),
    cancelled=st.dictionaries(st.integers(0, 13), st.integers(0, 80)),
    caps=st.lists(st.one_of(st.none(), st.integers(1, 3)), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_every_request_of_every_tenant_ends_and_every_page_comes_back(
    sizes: list[tuple[int, int, str, int]],
    n_pages: int,
    max_batch: int,
    max_step: int,
    n_slots: int,
    arrivals: list[int],
    cancelled: dict[int, int],
    caps: list[int | None],
) -> None:
    loop = SchedulerLoop(n_pages=n_pages, max_batch=max_batch, max_step=max_step, n_slots=n_slots)
    requests: dict[int, Request] = {}
    for n_steps in range(6000):
        for index, (n_prompt, max_tokens, adapter, tenant) in enumerate(sizes):
            if arrivals[index] == n_steps:
                share = TenantShare(f"t{tenant}", 1.0 + tenant, max_running=caps[tenant])
                requests[index] = loop.add(f"r{index}", n_prompt, max_tokens, adapter, share)
        for index, at in cancelled.items():
            if at == n_steps and index in requests and not _is_done(requests[index]):
                loop.scheduler.finish(requests[index])
        if len(requests) == len(sizes) and all(map(_is_done, requests.values())):
            break
        loop.step()
    for index, request in requests.items():
        assert _is_done(request)
        if index not in cancelled:
            assert request.n_output == request.source.sampling.max_tokens
    assert loop.kv.n_pages_held == 0
    assert not any(loop.adapters.held.values())
    assert len(loop.scheduler.waiting) == 0
