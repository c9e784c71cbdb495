"""Summaries of phases."""

import pytest

from loadtests.client import Outcome
from loadtests.recorder import PhaseRecord, percentile
from loadtests.scenario import Phase, Slo
from loadtests.shapes import Constant
from loadtests.traffic import LoadRequest

PHASE = Phase("p", users=Constant(1), seconds=10, sweep="adapters", adapters=8)


def record(*outcomes: tuple[float, str, Outcome]) -> PhaseRecord:
    found = PhaseRecord(PHASE)
    for sent_at, name, outcome in outcomes:
        request = LoadRequest("lora", name, {})
        context = {"request": request, "outcome": outcome, "sent_at": sent_at}
        found.on_request(request_type="E2E", context=context)
        found.on_request(request_type="TTFT", context={})
    return found


def answered(ttft_s: float, *, e2e_s: float = 1.0, gap_s: float = 0.02) -> Outcome:
    return Outcome(0.0, 200, ttft_s=ttft_s, gaps_s=[gap_s] * 3, e2e_s=e2e_s, n_tokens=4)


def test_a_phase_counts_served_refused_and_lost_apart() -> None:
    row = record(
        (-1.0, "a", answered(9.0)),  # while warming up
        (0.0, "a", answered(0.1)),
        (1.0, "a", answered(0.3)),
        (2.0, "b", Outcome(0.0, 429, retry_after="1")),
        (3.0, "b", Outcome(0.0, 500, error="500: broken")),
        (4.0, "b", answered(5.0)),
    ).summary(Slo(ttft_s=1.0, tpot_s=0.1))
    assert (row["requests"], row["served"], row["refused"], row["lost"]) == (5, 3, 1, 1)
    assert row["first_error"] == "500: broken"
    assert row["goodput_per_s"] == 0.2  # the late one does not count
    assert row["ttft_s"]["p50"] == 0.3
    assert row["itl_ms"]["p50"] == 20
    assert row["distinct_adapters"] == 2
    assert row["again_ttft_s"]["p50"] == 0.3  # a was used while warming up
    assert row["first_use_ttft_s"]["p50"] is None  # b was first refused


def test_slow_tokens_are_not_within_the_slo() -> None:
    row = record((0.0, "a", answered(0.1, gap_s=0.2)), (1.0, "a", answered(0.1))).summary(Slo())
    assert row["goodput_per_s"] == 0.1


@pytest.mark.parametrize(
    ("sent_at", "tokens"),
    [
        (3.0, 4),  # all of it while the phase counts
        (9.0, 2),  # half of it after the end
        (-1.0, 2),  # half of it in the warm-up
        (-3.0, 0),
        (11.0, 0),
    ],
)
def test_tokens_count_if_they_arrive_while_the_phase_counts(sent_at: float, tokens: int) -> None:
    row = record((sent_at, "a", answered(0.0, e2e_s=2.0))).summary(Slo())
    assert row["output_tok_s"] == tokens / 10


def test_an_answer_that_comes_in_one_piece_counts_where_it_arrives() -> None:
    whole = Outcome(0.0, 200, ttft_s=2.0, e2e_s=2.0, n_tokens=50)
    assert record((0.0, "a", whole)).summary(Slo())["output_tok_s"] == 5


def test_429_without_retry_after_is_no_proper_refusal() -> None:
    outcome = Outcome(0.0, 429, error="429: full")
    assert not outcome.refused
    assert record((0.0, "a", outcome)).summary(Slo())["lost"] == 1


def test_an_adapter_that_churn_removed_may_be_gone() -> None:
    found = PhaseRecord(PHASE, removed={"c1"})
    for name in ("c1", "c2"):
        outcome = Outcome(0.0, 404, error="404: unknown")
        request = LoadRequest("churned", name, {})
        context = {"request": request, "outcome": outcome, "sent_at": 1.0}
        found.on_request(request_type="E2E", context=context)
    row = found.summary(Slo())
    assert (row["gone"], row["lost"]) == (1, 1)


def test_percentiles() -> None:
    values = [float(n) for n in range(100)]
    assert [percentile(values, p) for p in (0, 50, 99)] == [0, 50, 99]
    assert percentile([], 50) is None
