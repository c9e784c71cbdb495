import pytest

from research.zoo.split import draw_split, load_split, task_digest
from research.zoo.tasks import Task, exact

SPLIT = load_split()
ALL = [name for members in SPLIT.sets.values() for name in members]
TRAIN = [Task.parse(name) for name in SPLIT.sets["train"]]


def test_the_committed_split_is_the_one_that_the_seed_draws() -> None:
    assert draw_split() == SPLIT


def test_the_zoo_has_the_promised_numbers_of_tasks() -> None:
    assert len(SPLIT.sets["train"]) >= 40
    assert len(SPLIT.sets["validation"]) >= 6
    assert len(SPLIT.test) >= 16


def test_no_task_is_in_two_sets() -> None:
    assert len(ALL) == len(set(ALL))


def test_h1_recombines_factors_that_were_trained_apart() -> None:
    contents, formats = {t.content for t in TRAIN}, {t.format for t in TRAIN}
    for name in SPLIT.sets["h1"]:
        task = Task.parse(name)
        assert task.content in contents
        assert task.format in formats


def test_h2_has_new_contents_in_families_that_were_trained() -> None:
    contents, families = {t.content for t in TRAIN}, {t.family for t in TRAIN}
    for name in SPLIT.sets["h2"]:
        assert Task.parse(name).content not in contents
        assert Task.parse(name).family in families


def test_h3_has_families_that_nothing_else_has() -> None:
    others = {
        Task.parse(n).family for s in ("train", "validation", "h1", "h2") for n in SPLIT.sets[s]
    }
    assert not {Task.parse(name).family for name in SPLIT.sets["h3"]} & others


def test_each_format_is_trained_on_as_many_tasks_as_any_other() -> None:
    counts = [sum(t.format == f for t in TRAIN) for f in {t.format for t in TRAIN}]
    assert min(counts) == max(counts)


@pytest.mark.parametrize("name", ALL)
def test_examples_are_the_same_each_time_and_splits_share_no_input(name: str) -> None:
    task = Task.parse(name)
    assert task.examples("test", 20) == task.examples("test", 20)
    prompts = [{e.prompt for e in task.examples(s, 150)} for s in ("train", "validation", "test")]
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]


def test_data_and_wordings_still_have_the_digests_that_were_committed() -> None:
    for name in ("card.de/tag", "email/caps", "plural/quotes", "date.it/json", "minutes/plain"):
        assert task_digest(Task.parse(name)) == SPLIT.digests[name]


def test_test_wordings_use_no_training_phrase() -> None:
    trained = {wording for task in TRAIN for wording in task.descriptions()}
    for name in SPLIT.test:
        task = Task.parse(name)
        assert len(task.descriptions()) >= 8
        assert not trained & set(task.test_descriptions())


def test_numbers_and_dates_are_spelled_as_their_languages_spell_them() -> None:
    def answers(name: str) -> dict[str, str]:
        splits = ("train", "validation", "test")
        return {e.prompt: e.answer for s in splits for e in Task.parse(name).examples(s, 900)}

    assert answers("card.de/plain")["342"] == "dreihundertzweiundvierzig"
    assert answers("card.fr/json")["71"] == '{"result": "soixante et onze"}'
    assert answers("ord.en/caps")["21"] == "TWENTY-FIRST"
    spanish, slashed = answers("date.es/tag"), answers("slash-date/quotes")
    for day in [d for d in spanish if d.endswith("-03-07")]:
        assert spanish[day] == f"<answer>7 de marzo de {day[:4]}</answer>"
    assert all(slashed[d] == f'"{d[8:]}/{d[5:7]}/{d[:4]}"' for d in slashed)


@pytest.mark.parametrize("name", ["list-reverse/plain", "initials/plain", "username/plain"])
def test_string_operations_do_what_they_say(name: str) -> None:
    for e in Task.parse(name).examples("test", 20):
        if name.startswith("list"):
            assert e.answer == ", ".join(reversed(e.prompt.split(", ")))
        else:
            first, last = e.prompt.split()
            wanted = f"{first[0]}.{last[0]}." if "initials" in name else (first[0] + last).lower()
            assert e.answer == wanted


def test_the_scorer_forgives_only_white_space_at_the_ends() -> None:
    assert exact(" zwei\n", "zwei")
    assert not exact("Zwei", "zwei")
    assert not exact('"zwei"', "zwei")


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="operations are"):
        Task.parse("fly/plain")
