"""When another job could improve an adapter that was learnt from examples."""

from loraplex_server.adapters.learning.learning_record import Record, is_final

TIMED_OUT: Record = {"finished": True, "timed_out": True, "budget_s": 30.0}


def test_only_a_larger_budget_improves_an_adapter_whose_job_ran_out_of_time() -> None:
    assert not is_final({"finished": False}, None)
    assert not is_final(TIMED_OUT, 31.0)
    assert is_final(TIMED_OUT, 30.0)
    assert is_final(TIMED_OUT, None)
    assert is_final({**TIMED_OUT, "timed_out": False}, 600.0)
