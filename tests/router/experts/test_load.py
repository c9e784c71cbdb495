import pytest

from loraplex_router.experts.load import ExpertLoad, LoadHistory, entropy, imbalance


def test_even_use_has_entropy_one_and_imbalance_one() -> None:
    assert entropy((5, 5, 5, 5)) == pytest.approx(1.0)
    assert imbalance((5, 5, 5, 5)) == pytest.approx(1.0)


def test_a_single_busy_expert_has_entropy_zero_and_the_worst_imbalance() -> None:
    assert entropy((12, 0, 0)) == 0.0
    assert imbalance((12, 0, 0)) == pytest.approx(3.0)


def test_nothing_counted_is_zero_not_an_error() -> None:
    assert entropy((0, 0)) == imbalance((0, 0)) == 0.0
    assert ExpertLoad({}, 0.0).per_expert == ()


def test_a_window_sees_only_what_came_after_it_began() -> None:
    history = LoadHistory(sample_s=1.0, keep_s=100.0)
    for second in range(11):
        history.record(float(second), {"mlp": (second * 10, second)})
    assert history.over(10.0, 1000.0).counts == {"mlp": (100, 10)}
    recent = history.over(10.0, 3.0)
    assert recent.counts == {"mlp": (30, 3)}
    assert recent.window_s == pytest.approx(3.0)


def test_counts_go_on_when_the_adapter_was_evicted_and_came_back() -> None:
    history = LoadHistory(sample_s=1.0)
    history.record(0.0, {"mlp": (4, 4)})
    history.record(1.0, {"mlp": (8, 4)})
    history.record(2.0, {"mlp": (1, 0)})  # placed anew
    assert history.over(2.0, 1000.0).counts == {"mlp": (9, 4)}


def test_memory_is_bounded_by_the_length_kept() -> None:
    history = LoadHistory(sample_s=1.0, keep_s=10.0)
    for second in range(1000):
        history.record(float(second), {"mlp": (second, 0)})
    assert history.over(999.0, 1e9).window_s <= 13.0


def test_the_json_names_each_place_with_its_own_figures() -> None:
    load = ExpertLoad({"a": (3, 1), "b": (0, 0)}, 60.0)
    shown = load.to_json()
    assert shown["n_picks"] == 4
    assert shown["imbalance"] == 1.5  # of the place that was used
    assert shown["places"] == [
        {"place": "a", "counts": [3, 1], "entropy": 0.8113, "imbalance": 1.5},
        {"place": "b", "counts": [0, 0], "entropy": 0.0, "imbalance": 0.0},
    ]


def test_loads_of_several_replicas_add_up_by_place() -> None:
    one = ExpertLoad({"0": (1, 2), "1": (3, 0)}, 60.0)
    other = ExpertLoad({"1": (1, 1), "2": (0, 5)}, 10.0)
    both = ExpertLoad.joined([one, other])
    assert both.counts == {"0": (1, 2), "1": (4, 1), "2": (0, 5)}
    assert both.window_s == 60.0
    assert ExpertLoad.joined([]) == ExpertLoad({}, 0.0)
