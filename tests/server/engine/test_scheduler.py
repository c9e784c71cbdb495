"""Scheduling: budget, preemption, fairness, bypass; nothing lost, nothing leaked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.requests.request import RequestStatus
from loraplex_server.engine.scheduling.scheduler import MAX_BYPASS
from loraplex_server.model.vision.prompt_image import Block
from tests.support.scheduler_loop import SchedulerLoop


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    harness = SchedulerLoop(max_step=8)
    short = harness.add("short", n_prompt=2, max_tokens=20)
    harness.step()
    long = harness.add("long", n_prompt=20, max_tokens=1)
    before = short.n_output
    n_steps = 0
    while long.status is not RequestStatus.FINISHED:
        harness.step()
        n_steps += 1
    assert n_steps == 3  # 7 tokens beside the decoding request, three times
    assert short.n_output == before + n_steps


@pytest.mark.parametrize(
    ("block", "ends"),
    [
        ((5, 11), [5, 12, 19, 20]),  # 7 tokens beside the decoding request; the block is not cut
        ((2, 18), [2, 18, 20]),  # exceeds a step
        ((0, 20), [20]),
    ],
)
def test_tokens_that_see_one_another_are_computed_together(
    block: tuple[int, int], ends: list[int]
) -> None:
    harness = SchedulerLoop(max_step=8)
    harness.add("short", n_prompt=2, max_tokens=20)
    harness.step()
    image = harness.add("image", n_prompt=20, max_tokens=1)
    image.blocks = (Block(*block, has_windows=True),)
    found = []
    while image.status is not RequestStatus.FINISHED:
        assert "short" in harness.step()
        found.append(image.n_computed)
    assert found == ends


def test_running_requests_are_preempted_youngest_first_and_nothing_is_lost() -> None:
    harness = SchedulerLoop(n_pages=8)
    requests = [harness.add(f"r{i}", n_prompt=6, max_tokens=12) for i in range(3)]
    for _ in range(200):
        if all(request.status is RequestStatus.FINISHED for request in requests):
            break
        harness.step()
    assert [request.n_output for request in requests] == [12, 12, 12]
    assert harness.scheduler.n_preemptions > 0
    assert requests[0].n_preempted == 0
    assert harness.kv.n_pages_held == 0


def test_a_flood_on_one_adapter_does_not_hold_up_another() -> None:
    harness = SchedulerLoop(max_batch=1)
    for index in range(10):
        harness.add(f"hot{index}", adapter="hot")
    harness.add("rare", adapter="rare")
    for _ in range(200):
        harness.step()
    assert harness.admitted.index("rare") <= 2
    assert len(harness.admitted) == 11


def test_requests_of_one_adapter_keep_their_order() -> None:
    harness = SchedulerLoop(max_batch=2)
    names = [f"r{index}" for index in range(6)]
    for name in names:
        harness.add(name, adapter="a")
    for _ in range(60):
        harness.step()
    assert harness.admitted == names


def test_a_request_without_a_place_is_bypassed_but_not_starved() -> None:
    harness = SchedulerLoop(max_batch=2)
    harness.adapters.full.add("cold")
    cold = harness.add("cold", max_tokens=1, adapter="cold")
    for index in range(MAX_BYPASS + 10):
        harness.add(f"warm{index}", max_tokens=1, adapter="warm")
    for _ in range(100):
        harness.step()
    assert cold.n_bypassed == MAX_BYPASS
    assert len(harness.admitted) == MAX_BYPASS
    harness.adapters.full.clear()
    harness.step()
    assert "cold" in harness.admitted


def test_a_loading_adapter_does_not_block_others_however_long_it_takes() -> None:
    harness = SchedulerLoop(max_batch=2)
    harness.adapters.loading.add("cold")
    cold = harness.add("cold", adapter="cold")
    for index in range(2 * MAX_BYPASS):
        harness.add(f"warm{index}", max_tokens=1, adapter="warm")
    for _ in range(200):
        harness.step()
    assert len(harness.admitted) == 2 * MAX_BYPASS
    assert cold.n_bypassed == 0


def test_a_request_whose_adapter_cannot_be_placed_fails_alone() -> None:
    harness = SchedulerLoop()
    harness.adapters.broken.add("bad")
    harness.add("bad", adapter="bad")
    good = harness.add("good", adapter="good")
    harness.scheduler.prefetch(8)
    for _ in range(10):
        harness.step()
    assert harness.failed == ["bad"]
    assert good.status is RequestStatus.FINISHED
    harness.adapters.broken.clear()
    again = harness.add("again", adapter="bad")
    for _ in range(10):
        harness.step()
    assert again.status is RequestStatus.FINISHED


def test_what_is_loaded_ahead_takes_no_place_from_what_is_needed_sooner() -> None:
    harness = SchedulerLoop()
    for name in ("one", "two", "three"):
        harness.add(name, adapter=name)
    harness.scheduler.prefetch(8)
    assert harness.adapters.spared == {"one": set(), "two": {"one"}, "three": {"one", "two"}}
    harness.step()  # what is admitted may take any idle one's place
    assert harness.adapters.spared["three"] == set()


def test_a_waiting_request_can_be_finished() -> None:
    harness = SchedulerLoop(max_batch=1)
    first, second = harness.add("first"), harness.add("second")
    harness.step()
    harness.scheduler.finish(second)
    for _ in range(20):
        harness.step()
    assert first.status is RequestStatus.FINISHED
    assert "second" not in harness.admitted


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["", "a", "b", "c"])),
        min_size=1,
        max_size=12,
    ),
    st.integers(14, 40),
    st.integers(1, 5),
    st.integers(1, 24),
    st.sets(st.integers(0, 11)),
)
@settings(max_examples=80, deadline=None)
def test_every_request_ends_and_every_page_comes_back(
    sizes: list[tuple[int, int, str]],
    n_pages: int,
    max_batch: int,
    max_step: int,
    cancelled: set[int],
) -> None:
    harness = SchedulerLoop(n_pages=n_pages, max_batch=max_batch, max_step=max(max_step, max_batch))
    requests = [harness.add(f"r{i}", *size) for i, size in enumerate(sizes)]
    for n_steps in range(3000):
        for index in cancelled:
            waits = index == n_steps and index < len(requests)
            if waits and requests[index].status is not RequestStatus.FINISHED:
                harness.scheduler.finish(requests[index])
        if all(request.status is RequestStatus.FINISHED for request in requests):
            break
        harness.step()
    for index, request in enumerate(requests):
        assert request.status is RequestStatus.FINISHED
        if index not in cancelled:
            assert request.n_output == request.source.sampling.max_tokens
    assert harness.kv.n_pages_held == 0
    assert all(count == 0 for count in harness.adapters.held.values())
    assert harness.n_first_admitted == len(harness.admitted)
