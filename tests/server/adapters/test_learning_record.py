"""Which of two results an adapter keeps, and when another attempt could give a better one."""

from __future__ import annotations

import pytest

from loraplex_server.adapters.learning_record import Record, is_better, may_learn_again

DRAFT: Record = {"finished": False}
NOTHING: Record = {"finished": True, "gained": False, "timed_out": True, "budget_s": 30.0}
SHORT: Record = {**NOTHING, "gained": True, "steps": 12}
LONGER: Record = {**SHORT, "steps": 40}
READING: Record = {**SHORT, "steps": 0, "timed_out": False}  # gets every pair right
WHOLE: Record = {**SHORT, "steps": 76, "timed_out": False}


@pytest.mark.parametrize(
    ("new", "old", "wins"),
    [
        (NOTHING, DRAFT, True),
        (NOTHING, NOTHING, True),
        (NOTHING, SHORT, False),
        (SHORT, NOTHING, True),
        (LONGER, SHORT, True),
        (SHORT, LONGER, False),
        (WHOLE, LONGER, True),
        (READING, LONGER, True),
    ],
)
def test_the_better_founded_result_stays(new: Record, old: Record, wins: bool) -> None:
    assert is_better(new, old) is wins


def test_a_result_is_learnt_again_only_where_time_cut_it_off_and_there_is_more() -> None:
    assert may_learn_again(DRAFT, 1.0)
    assert may_learn_again(SHORT, 31.0)
    assert not may_learn_again(SHORT, 30.0)
    assert not may_learn_again(WHOLE, 600.0)
