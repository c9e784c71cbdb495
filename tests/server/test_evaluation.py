"""Metrics of `loraplex eval`, on cases that can be worked out by hand."""

import pytest

from loraplex_server.evaluation.metrics import METRICS, fitting_metric, mean_of


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "score"),
    [
        ("exact", " Refund  please", "refund please", 1),
        ("exact", "refund, please", "refund please", 0),
        ("contains", "It is a Refund.", "refund", 1),
        ("contains", "It is.", "refund", 0),
        ("json", '{"B": [1, 2], "a": "X"}', '{"a": "x", "b": [1, 2]}', 1),
        ("json", '{"a": [2, 1]}', '{"a": [1, 2]}', 0),
        ("json", "a: 1", '{"a": 1}', 0),
        ("rouge-l", "the cat sat", "the cat", 0.8),  # precision 2/3, recall 1
        ("rouge-l", "", "the cat", 0),
    ],
)
def test_scores(metric: str, answer: str, expected: str, score: float) -> None:
    assert METRICS[metric](answer, expected) == pytest.approx(score)


def test_the_metric_follows_the_expected_answers() -> None:
    assert fitting_metric(['{"a": 1}', "[2]"]) == "json"
    assert fitting_metric(['{"a": 1}', "2"]) == "exact"


def test_the_interval_is_that_of_a_binomial_mean() -> None:
    mean = mean_of([1.0] * 60 + [0.0] * 40)
    assert mean.value == pytest.approx(0.6)
    assert mean.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.02)
    assert mean.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.02)
    assert mean_of([1.0, 1.0]) == (1, 1, 1)
