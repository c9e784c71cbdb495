"""Ten lives of what `make soak` does for an hour."""

import pytest

from tests.soak.run import Plan, soak


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("catalogue", "last_life_s"), [(False, 480.0), (True, 60.0)])
def test_ten_lives_under_attack_lose_nothing_and_no_adapter_answers_for_another(
    catalogue: bool, last_life_s: float
) -> None:
    """One last life is long enough to see whether memory grows."""
    report = soak(Plan(10, 12.0, last_life_s, seed=3, catalogue=catalogue))
    assert report["problems"] == []
    assert report["acknowledged"] >= 50  # type: ignore[operator]
    assert report["counts"]["answers"] >= 200  # type: ignore[index]
    assert report["counts"]["attacks"] >= 50  # type: ignore[index]
