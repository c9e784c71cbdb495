"""Scenarios: what is shipped can be read, and a typing error does not become a measurement."""

from pathlib import Path
from typing import Any

import pytest

from loadtests.baselines.selection import n_adapters_of, phase_for_baseline
from loadtests.scenario import ScenarioError, load_scenario, parse_scenario, scenario_files
from loraplex_server.settings.sources import resolve_config


@pytest.mark.parametrize("name", scenario_files())
def test_every_scenario_can_be_read_and_its_server_options_exist(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.summary
    options = {key.replace("-", "_"): value for key, value in scenario.server.items()}
    resolve_config(options)


def test_the_kinds_of_load_that_users_meet_are_there() -> None:
    wanted = {"steps", "spike", "sawtooth", "drift", "cold", "churn", "generation", "mixed"}
    assert wanted | {"adapters", "skew", "saturation", "overload"} <= set(scenario_files())


def table(**phase: Any) -> dict[str, Any]:
    return {
        "summary": "x",
        "adapters": {"lora": 4},
        "phase": [{"label": "p", "users": 2, **phase}],
    }


def test_a_phase_may_say_little() -> None:
    phase = parse_scenario("s", table()).phases[0]
    assert phase.users is not None
    assert phase.users.level(0, 1) == 2
    assert phase.mix == {"lora": 1.0}


def test_one_zipf_exponent_holds_for_the_whole_phase_and_two_are_its_ends() -> None:
    assert parse_scenario("s", table(zipf=1)).phases[0].zipf == (1.0, 1.0)
    phase = parse_scenario("s", table(zipf=[0.5, 1.5])).phases[0]
    assert phase.zipf == (0.5, 1.5)
    assert phase.pick == "zipf"


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"second": 3}, "no 'second'"),
        ({"rate": 1}, "one of them"),
        ({"pick": "best"}, "unknown pick"),
        ({"mix": {"qlora": 1}}, "unknown family"),
        ({"mix": {"lora": 0}}, "nothing in its mix"),
        ({"mix": {"mixlora": 1}}, "has none"),
        ({"mix": {"churned": 1}}, "churn_per_s"),
        ({"adapters": 5}, "uses 5 adapters"),
        ({"sweep": "luck"}, "unknown sweep"),
        ({"kind": "dance"}, "unknown kind"),
    ],
)
def test_what_makes_no_sense_is_refused(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        parse_scenario("s", table(**phase))


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="mixed"):
        load_scenario("nothing")
    broken = tmp_path / "broken.toml"
    broken.write_text("x = [")
    with pytest.raises(ScenarioError, match=r"broken\.toml"):
        load_scenario(str(broken))


def test_baselines_get_only_what_they_can_run() -> None:
    plain = parse_scenario("s", table(adapters=4, mix={"base": 1, "lora": 1, "generated": 1}))
    fit = phase_for_baseline(plain.phases[0])
    assert fit is not None
    assert set(fit.mix) == {"base", "lora"}
    assert n_adapters_of(fit) == 4
    churn = parse_scenario("s", table(adapters=4, churn_per_s=1))
    assert phase_for_baseline(churn.phases[0]) is None


def test_a_baseline_without_adapters_to_serve_loads_none() -> None:
    phase = phase_for_baseline(parse_scenario("s", table(mix={"base": 1})).phases[0])
    assert phase is not None
    assert n_adapters_of(phase) == 0
