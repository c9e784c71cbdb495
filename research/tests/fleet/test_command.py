import json
from pathlib import Path

import pytest

from research.fleet import TRAFFIC, Costs, LoadCost
from research.fleet.__main__ import main
from research.fleet.policies import POLICIES

COSTS = Costs(2.0, 0.5, 0.1, 0.01, 3.0, LoadCost(5.0, 0.0), LoadCost(10.0, 4.0))


def test_the_command_prints_a_row_for_every_traffic_and_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "costs.json").write_text(json.dumps({"costs": COSTS.to_json()}))
    assert Costs.load(tmp_path / "costs.json") == COSTS
    arguments = ["--costs", str(tmp_path / "costs.json"), "--replicas", "2", "--requests", "200"]
    monkeypatch.setattr("sys.argv", ["simulation", *arguments])
    main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(TRAFFIC) * len(POLICIES)
    assert {row.count("|") for row in rows} == {11}
