"""A minute of what `make soak` does for an hour."""

from __future__ import annotations

import pytest

from tests.soak.run import soak


@pytest.mark.slow
@pytest.mark.nightly
def test_a_minute_of_chaos_loses_nothing_and_no_adapter_answers_for_another() -> None:
    report = soak(1.0, seed=3, restart_s=18.0)
    assert report["problems"] == []
    assert report["kills"] + report["stops"] >= 1  # type: ignore[operator]
    assert report["acknowledged"] >= 5  # type: ignore[operator]
    assert report["counts"]["answers"] >= 20  # type: ignore[index]
