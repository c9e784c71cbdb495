"""The commands behind research/fleet/README.md, without servers; the page and its files."""

import json
from pathlib import Path

import pytest

from research.fleet import TRAFFIC, Costs, LoadCost
from research.fleet.policies import POLICIES
from research.fleet.study.fit import fitted
from research.fleet.study.study import BEGIN, END, Size, page_tables, run
from research.fleet.traffic import BYTES_PER_RANK, RANKS

FLEET = Path(__file__).resolve().parents[2] / "fleet"
COSTS = Costs(2.0, 0.5, 0.1, 0.01, 3.0, LoadCost(5.0, 1.0), LoadCost(10.0, 4.0))


def test_the_fit_finds_the_costs_that_made_the_measurements() -> None:
    low, high = RANKS[0], RANKS[-1]
    measured = {
        "prefill": {n: COSTS.step(0, 0, n) + COSTS.overhead_ms for n in (16, 128, 448)},
        "decode": {n: COSTS.step(n, 0, 0) for n in (1, 2, 4, 8)},
        "rank": {r: COSTS.step(4, 4 * r, 0) for r in (low, high)},
        "host_to_device": {r: COSTS.host_to_device.of(r * BYTES_PER_RANK) for r in (low, high)},
        "disk_to_host": {r: COSTS.disk_to_host.of(r * BYTES_PER_RANK) for r in (low, high)},
    }
    found = fitted(measured).to_json()
    for name, value in COSTS.to_json().items():
        assert found[name] == pytest.approx(value), name


def test_a_cost_that_noise_makes_negative_is_zero() -> None:
    flat = {RANKS[0]: 7.0, RANKS[-1]: 6.0}
    measured = {
        "prefill": {16: 5.0, 448: 4.0},
        "decode": {1: 3.0, 8: 2.0},
        "rank": flat,
        "host_to_device": flat,
        "disk_to_host": flat,
    }
    assert min(fitted(measured).step(1, 1, 1), fitted(measured).host_to_device.ms_per_mb) >= 0


def test_the_study_has_a_row_for_every_fleet_traffic_and_policy() -> None:
    results = run(COSTS, [Size(2, 20, 60), Size(3, 20, 60)], Size(2, 10, 60))
    assert len(results["fleets"]) == 2 * len(TRAFFIC) * len(POLICIES)
    assert set(results["promise"]["replicas"]) == set(TRAFFIC)
    assert set(results["decision_us"]) == {1, 10, 100, 1000}
    text = page_tables({"costs": json.loads(json.dumps(results))})
    assert text.count("| zipf | loraplex |") == 2
    assert "| 1,000 |" in text


def test_the_tables_of_the_page_are_those_of_its_results() -> None:
    page = (FLEET / "README.md").read_text()
    shown = page.partition(BEGIN)[2].partition(END)[0]
    results = json.loads((FLEET / "results" / "results.json").read_text())
    assert shown.strip() == page_tables(results).strip()


def test_the_check_of_the_page_is_that_of_its_results() -> None:
    page = (FLEET / "README.md").read_text()
    check = json.loads((FLEET / "results" / "check.json").read_text())
    for name, of_policy in check["policies"].items():
        for key in ("ttft_p50_ms", "ttft_p99_ms"):
            measured, simulated = (of_policy[k][key] for k in ("measured", "simulated"))
            assert f"| {measured:.0f} ms | {simulated:.0f} ms |" in page, (name, key)
