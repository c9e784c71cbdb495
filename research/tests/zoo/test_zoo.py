"""The tasks of the shipped adapters ``chores`` and ``clock-12h``, and of ``relative_claims``."""

import hashlib
import json

import pytest

from research.zoo.chores import CHORES, chats
from research.zoo.tasks import Task

CLAIMED = ("date.de/sentence", "initials/tag", "list-reverse/quotes", "minutes/plain")
SPLITS = ("train", "validation", "test")
ALL = (*CHORES, *CLAIMED[2:3], "clock/plain")


@pytest.mark.parametrize("name", ALL)
def test_examples_are_the_same_each_time_and_splits_share_no_input(name: str) -> None:
    task = Task.parse(name)
    assert task.examples("test", 20) == task.examples("test", 20)
    prompts = [{e.prompt for e in task.examples(split, 150)} for split in SPLITS]
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]


@pytest.mark.parametrize(
    ("names", "digest"),
    [
        (CHORES, "221fe45319f4c12a84a04db1057d3d67f3c44d700a361ab66138d141e261d33c"),
        (
            (*CLAIMED, "clock/plain"),
            "3a9287163b392668f1048f00e9b4edeab229d4ad4bcb70d654ad55bd9ef6aa98",
        ),
    ],
    ids=["chores", "claims and clock"],
)
def test_the_data_are_those_that_the_published_numbers_were_measured_with(
    names: tuple[str, ...], digest: str
) -> None:
    texts = [json.dumps(chats(names, split, 320)) for split in SPLITS]
    assert hashlib.sha256("".join(texts).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", ALL)
def test_test_wordings_use_no_training_phrase(name: str) -> None:
    task = Task.parse(name)
    assert len(task.descriptions()) >= 8
    assert not set(task.descriptions()) & set(task.test_descriptions())


def test_dates_are_written_as_their_languages_write_them() -> None:
    for example in Task.parse("date.es/tag").examples("train", 900):
        if example.prompt.endswith("-03-07"):
            year = example.prompt[:4]
            assert example.answer == f"<answer>7 de marzo de {year}</answer>"


@pytest.mark.parametrize("name", ["list-reverse/plain", "initials/plain"])
def test_string_operations_do_what_they_say(name: str) -> None:
    for e in Task.parse(name).examples("test", 20):
        if name.startswith("list"):
            assert e.answer == ", ".join(reversed(e.prompt.split(", ")))
        else:
            first, last = e.prompt.split()
            assert e.answer == f"{first[0]}.{last[0]}."


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="operations are"):
        Task.parse("fly/plain")
