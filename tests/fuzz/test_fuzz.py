"""Odd requests and adapter files: some at each push, more at night; `make fuzz` sends 100,000."""

import pytest

from .campaign import Target

SEED = 20


@pytest.mark.parametrize("n_cases", [800, pytest.param(8000, marks=pytest.mark.nightly)])
def test_no_request_breaks_the_server_shows_its_inside_or_changes_another_answer(
    target: Target, n_cases: int
) -> None:
    findings = target.run(SEED, range(n_cases))
    assert not findings, "\n\n".join(map(str, findings))
    # it did reach what lies behind the checks, and was refused in many ways
    assert target.statuses[200] > n_cases // 10
    assert target.statuses[400] > 4 * n_cases // 10
    assert {201, 404, 405, 415} <= target.statuses.keys()
    paths = target.client.get("/openapi.json").json()["paths"]
    documented = {(method, path) for path, methods in paths.items() for method in methods}
    assert target.routes == documented
