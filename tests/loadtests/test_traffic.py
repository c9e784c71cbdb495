"""Traffic is the same in every run, skewed as asked, with unique prompts."""

from collections import Counter
from dataclasses import replace

from loadtests.scenario import Phase, RequestSpec
from loadtests.shapes import Constant
from loadtests.traffic import LoraplexBody, Traffic

NAMES = {"lora": [f"a{n}" for n in range(100)], "mixlora": ["m0", "m1"], "churned": list[str]()}
PHASE = Phase("p", users=Constant(1))


def traffic(phase: Phase, seed: int = 1) -> Traffic:
    return Traffic(phase, RequestSpec(prompt_chars=80), NAMES, LoraplexBody(), seed)


def names(phase: Phase, n: int, progress: float = 0.5) -> list[str | None]:
    source = traffic(phase)
    return [source.next(progress).name for _ in range(n)]


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    phase = replace(PHASE, pick="zipf", zipf=(1.0, 1.0), mix={"lora": 1, "base": 1})
    one, two, other = traffic(phase), traffic(phase), traffic(phase, seed=2)
    first = [one.next(0.1).body for _ in range(50)]
    assert first == [two.next(0.1).body for _ in range(50)]
    assert first != [other.next(0.1).body for _ in range(50)]


def test_round_robin_uses_each_adapter_of_the_phase_once_before_any_twice() -> None:
    assert Counter(names(replace(PHASE, adapters=8), 16)) == {f"a{n}": 2 for n in range(8)}


def test_fresh_never_asks_twice() -> None:
    assert len(set(names(replace(PHASE, pick="fresh"), 100))) == 100


def test_a_higher_exponent_means_fewer_favourites() -> None:
    def distinct(exponent: float) -> int:
        return len(set(names(replace(PHASE, pick="zipf", zipf=(exponent, exponent)), 300)))

    assert distinct(0.0) > distinct(1.0) > distinct(2.0)


def test_drift_moves_the_favourites() -> None:
    phase = replace(PHASE, pick="zipf", zipf=(3.0, 3.0), drift=1.0)
    begin = Counter(names(phase, 100, progress=0.0)).most_common(1)[0][0]
    later = Counter(names(phase, 100, progress=0.5)).most_common(1)[0][0]
    assert (begin, later) == ("a0", "a50")


def test_shares_of_a_mix_are_kept_and_each_family_is_asked_in_its_own_way() -> None:
    source = traffic(replace(PHASE, mix={"base": 1, "lora": 2, "generated": 1}))
    asked = [source.next(0.0) for _ in range(400)]
    count = Counter(request.family for request in asked)
    assert 60 < count["base"] < 140
    assert 150 < count["lora"] < 250
    for request in asked:
        adapter = request.body.get("adapter")
        if request.family == "base":
            assert adapter is None
        elif request.family == "generated":
            assert set(adapter) == {"description"}
        else:
            assert adapter == request.name


def test_no_prompt_begins_like_another() -> None:
    source = traffic(PHASE)
    prompts = [source.next(0.0).body["messages"][0]["content"] for _ in range(200)]
    assert len({prompt[:8] for prompt in prompts}) == 200
    assert {len(prompt) for prompt in prompts} == {80}


def test_while_nothing_is_registered_churned_requests_go_to_the_base() -> None:
    source = traffic(replace(PHASE, mix={"churned": 1}, churn_per_s=1))
    assert source.next(0.0).family == "base"


def test_an_answer_of_a_structured_phase_follows_the_schema_and_ends_with_it() -> None:
    request = RequestSpec(prompt_chars=80, json_schema={"type": "object"})
    source = Traffic(replace(PHASE, structured=True), request, NAMES, LoraplexBody(), 1)
    body = source.next(0.5).body
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "ignore_eos" not in body
    assert "response_format" not in traffic(PHASE).next(0.5).body
