"""The measure of enforced schemas judges what a grammar allows, and counts what is refused."""

from loadtests.parts.bench_schemas import judged


def test_a_schema_is_enforced_or_refused_by_name() -> None:
    tests = [{"data": data, "valid": None} for data in ([1, 2], [2], [1, 1], "a")]
    schema = {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 2}}
    outcome = judged({"schema": schema, "tests": tests}, n_texts=5)
    assert outcome.refusal == ""
    assert outcome.n_texts > 0
    assert (outcome.n_invalid, outcome.n_instances, outcome.n_refused) == (0, 2, 0)
    refused = judged({"schema": {"type": "array", "uniqueItems": True}, "tests": []}, n_texts=5)
    assert "uniqueItems" in refused.refusal
