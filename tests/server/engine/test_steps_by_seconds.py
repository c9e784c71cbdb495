"""Steps of several tenants are composed by their estimated seconds; the clock is simulated."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from loraplex_server.engine.requests.client import TenantShare
from loraplex_server.engine.requests.request import RequestStatus
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.engine.scheduling.step_cost import Chunk, StepCost
from tests.support.scheduler_loop import SchedulerLoop

_KV_TOKEN_BYTES = 200_000
_SMALL, _FLOOD = TenantShare("small"), TenantShare("flood")


@dataclass(frozen=True)
class _Device:
    """A device whose steps take what the estimate's formula says, with these coefficients."""

    fixed_s: float = 0.03
    row_s: float = 0.001
    context_s: float = 5e-5  # half of the prior
    token_s: float = 0.001
    pair_s: float = 1e-6

    def seconds_of(self, chunks: Sequence[Chunk]) -> float:
        seconds = self.fixed_s
        for chunk in chunks:
            if chunk.n_tokens == 1:
                seconds += self.row_s + self.context_s * (chunk.start + 1)
            else:
                mean = chunk.start + chunk.n_tokens / 2
                seconds += chunk.n_tokens * (self.token_s + self.pair_s * mean)
        return seconds


def _loop(device: _Device = _Device(), max_gap_s: float = math.inf) -> SchedulerLoop:
    return SchedulerLoop(
        n_pages=64 * 64,
        max_batch=64,
        max_step=128,
        kv_token_bytes=_KV_TOKEN_BYTES,
        seconds_of=device.seconds_of,
        max_gap_s=max_gap_s,
    )


def _flooded(loop: SchedulerLoop, n_rows: int = 60) -> None:
    """A tenant decodes ``n_rows`` long rows before anybody else comes."""
    for index in range(n_rows):
        loop.add(f"f{index}", 80, 170, share=_FLOOD)
    while len(loop.chunks) < n_rows:
        loop.step()


def test_a_lone_tenant_gets_all_its_rows_in_every_step() -> None:
    loop = _loop()
    _flooded(loop)
    for _ in range(20):
        assert len(loop.step()) == 60
    assert _Device().seconds_of(loop.chunks) > 0.3


@pytest.mark.parametrize("n_others", [0, 1, 4], ids=["lone", "shared", "beside rows of others"])
def test_prompts_leave_rows_short_gaps(n_others: int) -> None:
    """``n_others``: tenants that have come; a single one has left when the prompts come."""
    device = _Device(token_s=0.004, context_s=1e-5)
    times, n_tokens = [], 0
    loop = _loop(device, max_gap_s=0.15)
    names = {"row", *(f"other{number}" for number in range(n_others))}
    for name in names:
        n_rows = 1 if n_others == 1 and name != "row" else 200
        loop.add(name, 4, n_rows, share=TenantShare(name if n_others else ""))
    for _ in range(5):
        loop.step()
    for index in range(8):
        loop.add(f"p{index}", 200, 1, share=TenantShare("row" if n_others else ""))
    rows = names & {request.id for request in loop.scheduler.running}
    while len(loop.scheduler.running) > len(rows) or len(loop.scheduler.waiting):
        assert rows <= set(loop.step())
        times.append(device.seconds_of(loop.chunks))
        n_tokens += sum(chunk.n_tokens for chunk in loop.chunks) - len(rows)
    assert n_tokens >= 8 * 200
    assert max(times) < 0.6  # the first steps, of which the estimate knows nothing
    assert max(times[10:]) < 1.1 * 0.15
    assert sum(times[10:]) / len(times[10:]) > 0.12  # no step is shorter than it need be
    for request in list(loop.scheduler.running):
        loop.scheduler.finish(request)
    loop.add("prompt", 200, 1, share=TenantShare("row" if n_others else ""))
    loop.step()
    assert loop.chunks[0].n_tokens == 128  # nobody waits


def test_a_flood_of_long_rows_leaves_a_stream_most_of_its_fair_share() -> None:
    device = _Device()
    loop = _loop(device)
    _flooded(loop)
    loop.add("stream", 4, 200, share=_SMALL)
    alone_s = device.seconds_of([ScheduledChunk(loop.add("other", 4, 1), 100, 1)])
    times, rows = [], Counter[str]()
    for _ in range(60):
        rows.update(loop.step())
        times.append(device.seconds_of(loop.chunks))
    assert rows["stream"] == 60  # in every step, so that a step is a gap
    assert max(times) <= 0.25
    assert sum(times[10:]) / 50 <= 1.6 * 2 * alone_s
    assert sum(times[10:]) / 50 >= 2 * alone_s  # and no less: the flood has its share, too
    of_flood = [rows[f"f{index}"] for index in range(60)]
    assert min(of_flood) > 0.6 * max(of_flood)  # rows take turns; shorter ones fill gaps


def test_a_flood_of_prompts_leaves_a_stream_most_of_its_fair_share() -> None:
    device = _Device(token_s=0.004)
    loop = _loop(device)
    loop.add("stream", 4, 200, share=_SMALL)
    for _ in range(20):
        loop.step()
    for index in range(200):
        loop.add(f"p{index}", 200, 1, share=_FLOOD)
    alone_s = device.seconds_of([ScheduledChunk(loop.scheduler.running[0], 100, 1)])
    times, n_tokens = [], 0
    for _ in range(60):
        assert "stream" in loop.step()
        times.append(device.seconds_of(loop.chunks))
        n_tokens += sum(chunk.n_tokens for chunk in loop.chunks) - 1
    assert max(times) <= 0.25
    assert sum(times[10:]) / 50 <= 1.6 * 2 * alone_s
    assert n_tokens * device.token_s > sum(times) / 2  # half of the time and more is the flood's


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_seconds_are_shared_by_weight(weight: float) -> None:
    device = _Device()
    loop = _loop(device)
    heavy = TenantShare("heavy", weight)
    for index in range(30):
        loop.add(f"a{index}", 150, 100, share=_FLOOD)
        loop.add(f"b{index}", 150, 100, share=heavy)
    for _ in range(200):
        loop.step()
        if len(loop.scheduler.running) == 60 and not len(loop.scheduler.waiting):
            break
    rows = Counter[str]()
    for _ in range(60):
        rows.update(name[0] for name in loop.step())
    assert rows["b"] / rows["a"] == pytest.approx(weight, rel=0.35)


def test_tenants_with_usual_rows_share_steps_without_turns() -> None:
    loop = _loop()
    for index in range(10):
        loop.add(f"a{index}", 20, 100, share=_SMALL)
        loop.add(f"b{index}", 20, 100, share=_FLOOD)
    for _ in range(20):
        loop.step()
    for _ in range(50):
        assert len(loop.step()) == 20


@pytest.mark.parametrize("max_tokens", [1, 50], ids=["prompts", "rows"])
def test_a_row_or_prompt_that_exceeds_its_share_sits_out_steps(max_tokens: int) -> None:
    """A row of the flood takes 60 ms and 16 tokens of its prompt 110 ms; a step of the stream 20.

    These are the ratios of the default base on two cores, at contexts of 6,000 tokens.
    """
    device = _Device(0.0155, 0.0013, 3e-4, 0.0034, 2e-5)
    loop = _loop(device)
    loop.add("before", 4, 30, share=_SMALL)
    while loop.step():
        pass
    for number in range(8):
        loop.add(f"f{number}", 200, max_tokens, share=_FLOOD)
    while max_tokens > 1 and len(loop.chunks) < 8:
        loop.step()
    stream = loop.add("stream", 4, 80, share=_SMALL)
    alone_s, gaps, of_flood_s = 0.0, [0.0], 0.0
    while stream.status is not RequestStatus.FINISHED:
        if len(loop.scheduler.running) < 9:  # the flood never ends
            loop.add(f"f{(number := number + 1)}", 200, max_tokens, share=_FLOOD)
        loop.step()
        seconds = device.seconds_of(loop.chunks)
        of_stream = [chunk for chunk in loop.chunks if chunk.request is stream]
        of_flood_s += seconds - device.seconds_of(of_stream)
        gaps[-1] += seconds
        if of_stream:
            alone_s += device.seconds_of(of_stream)
            gaps.append(0.0)
    assert sum(gaps) <= 2 * alone_s / 0.7  # 0.7 of the fair rate
    assert max(gaps) <= 0.25
    assert of_flood_s >= 0.4 * sum(gaps)


def test_every_prompt_and_every_row_goes_on_where_seconds_are_too_few() -> None:
    """Nothing fits a step but the fixed part: all tenants get a row and some tokens of a prompt."""
    loop = _loop(_Device(fixed_s=1.0, row_s=3.0, token_s=3.0))
    shares = [TenantShare(f"t{number}") for number in range(5)]
    for share in shares:
        loop.add(f"{share.tenant}-row", 1, 200, share=share)
    for _ in range(10):
        loop.step()
    requests = [loop.add(f"{share.tenant}-prompt", 100, 1, share=share) for share in shares]
    rows = Counter[str]()
    for _ in range(20):
        rows.update(loop.step())
    assert all(rows[f"{share.tenant}-row"] > 10 for share in shares)
    assert all(request.n_output for request in requests)


def test_the_estimate_learns_the_coefficients() -> None:
    device, cost = _Device(), StepCost(_KV_TOKEN_BYTES)
    request = SchedulerLoop().add("r", 4, 1)
    for number in range(200):
        rows = [ScheduledChunk(request, 7 * number % 5000, 1)] * (number % 13)
        prompts = [ScheduledChunk(request, 31 * number % 4000, 2 + 5 * number % 100)]
        chunks = rows + prompts * (number % 3)
        cost.measured(chunks, device.seconds_of(chunks))
    assert cost.fixed_s == pytest.approx(device.fixed_s, rel=0.05)
    for start, n_tokens in ((10, 1), (3000, 1), (0, 100), (3000, 100)):
        chunk = ScheduledChunk(request, start, n_tokens)
        expected = device.seconds_of([chunk]) - device.fixed_s
        assert cost.chunk_s(start, n_tokens) == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_one_slow_step_hardly_changes_the_estimate() -> None:
    device, cost = _Device(), StepCost(_KV_TOKEN_BYTES)
    chunk = ScheduledChunk(SchedulerLoop().add("r", 4, 1), 100, 1)
    for _ in range(50):
        cost.measured([chunk], device.seconds_of([chunk]))
    cost.measured([chunk], 100 * device.seconds_of([chunk]))
    estimate = cost.fixed_s + cost.chunk_s(chunk.start, 1)
    assert estimate == pytest.approx(device.seconds_of([chunk]), rel=0.05)


@pytest.mark.parametrize(("start", "n_tokens"), [(0, 1), (5000, 1), (0, 128), (5000, 128)])
@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.05, 10.0])
def test_tokens_that_fit_take_no_more_than_the_seconds(
    start: int, n_tokens: int, seconds: float
) -> None:
    cost = StepCost(_KV_TOKEN_BYTES)
    n_fitting = cost.n_fitting(start, n_tokens, seconds)
    assert n_fitting <= n_tokens
    assert n_fitting < 2 or cost.chunk_s(start, n_fitting) <= seconds
    assert n_fitting == (n_tokens if seconds == 10 else n_fitting)
