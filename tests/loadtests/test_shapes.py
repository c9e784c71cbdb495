"""Load shapes: how much when."""

import pytest

from loadtests.shapes import Constant, Sawtooth, Spike, Steps, parse_shape


def levels(shape: Constant | Steps | Spike | Sawtooth, seconds: int) -> list[float]:
    return [shape.level(t, seconds) for t in range(seconds)]


def test_a_number_is_a_constant() -> None:
    assert levels(parse_shape(3), 4) == [3, 3, 3, 3]


def test_steps_have_equal_length_and_the_last_one_stays() -> None:
    steps = parse_shape({"kind": "steps", "levels": [4, 8, 16]})
    assert levels(steps, 6) == [4, 4, 8, 8, 16, 16]
    assert steps.level(7, 6) == 16


def test_a_spike_takes_the_middle_fifth() -> None:
    assert levels(parse_shape({"kind": "spike", "low": 1, "high": 9}), 5) == [1, 1, 9, 1, 1]


def test_a_sawtooth_climbs_and_falls_at_once() -> None:
    saw = parse_shape({"kind": "sawtooth", "low": 0, "high": 4, "period_s": 4})
    assert levels(saw, 8) == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    "value",
    [
        -1,
        True,
        "4",
        {"kind": "sine"},
        {"kind": "spike", "low": 1},
        {"kind": "steps", "levels": []},
    ],
)
def test_what_is_no_shape_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"shape|level"):
        parse_shape(value)
