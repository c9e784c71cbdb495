"""Paraphrases of descriptions give no wording of the test away."""

import re

import pytest

from research.zoo.cells import cells, trainable
from research.zoo.dressings import contents_of
from research.zoo.formats import FORMATS
from research.zoo.novelty import novelty
from research.zoo.operations import OPERATIONS
from research.zoo.phrasings import paraphrases, phrasings, suffixes
from research.zoo.rows import fill_number
from research.zoo.split import load_split
from research.zoo.tasks import Task

SPLIT = load_split("wide")
TRAINED = [Task.parse(name) for name in SPLIT.sets["train"]]
HELD_OUT = [Task.parse(name) for of in ("validation", "test") for name in SPLIT.sets[of]]
FRAMES = ("I need ", "Tell me ", "Output ", "I want you to ", "You should ", "Now ")  # of tests
LONG = 4  # words: a shorter test phrase may stand inside a paraphrase by chance


def test_every_trained_operation_has_paraphrases_and_they_differ() -> None:
    for task in TRAINED:
        found = paraphrases(task.operation)
        assert len(found) >= 30, task.operation
        assert len({*found, *OPERATIONS[task.operation].wordings}) == (
            len(found) + len(OPERATIONS[task.operation].wordings)
        )


def test_an_operation_that_is_held_out_has_none() -> None:
    trained = {task.operation for task in TRAINED}
    series = {OPERATIONS[name].series for name in trained}
    for task in HELD_OUT:
        if task.operation not in trained and OPERATIONS[task.operation].series not in series:
            assert paraphrases(task.operation) == ()


def test_no_paraphrase_holds_a_test_phrase_of_any_operation() -> None:
    tested = {_plain(_without_frame(w)) for op in OPERATIONS.values() for w in op.test_wordings}
    longer = [phrase for phrase in tested if len(phrase.split()) >= LONG]
    for operation in {task.operation for task in TRAINED}:
        for paraphrase in map(_plain, paraphrases(operation)):
            assert paraphrase not in tested
            assert not any(f" {phrase} " in f" {paraphrase} " for phrase in longer), paraphrase


def test_no_suffix_holds_a_test_suffix_of_any_format() -> None:
    tested = [_plain(suffix) for of in FORMATS.values() for suffix in of.test_suffixes]
    for dressing in FORMATS:
        assert len({*suffixes(dressing)}) == len(suffixes(dressing)) >= 28
        for suffix in map(_plain, suffixes(dressing)):
            assert not any(f" {phrase} " in f" {suffix} " for phrase in tested), suffix


def test_a_number_and_a_language_are_filled_in() -> None:
    for operation in {task.operation for task in TRAINED if OPERATIONS[task.operation].series}:
        n = OPERATIONS[operation].place
        said = "|".join((str(n), *fill_number(["{word}", "{nth}"], n)))
        for text in paraphrases(operation):
            assert re.search(rf"(?<![0-9])({said})(?![0-9])", text), (operation, text)
    for task in TRAINED:
        asks = any("{language}" in text for text in paraphrases(task.operation))
        assert asks == any("{language}" in text for text in OPERATIONS[task.operation].wordings)
    made = phrasings(["card.de"], ["plain"], 1)
    assert all("german" in phrasing.text.lower() for phrasing in made)


def test_phrasings_are_the_same_each_time_and_ask_for_the_formats_that_are_known() -> None:
    made = phrasings(["plural", "email"], ["json", "caps"], 4)
    assert made == phrasings(["plural", "email"], ["json", "caps"], 4)
    assert {phrasing.dressing for phrasing in made} == {"json", "caps"}
    assert {phrasing.content for phrasing in made} == {0, 1}
    for phrasing in made:
        assert phrasing.phrases[1] in suffixes(phrasing.dressing)
    plain = phrasings(["plural"], ["plain", "json"], 4)
    assert any(phrasing.phrases[1] == "" for phrasing in plain)
    assert all(p.dressing == "plain" for p in plain if p.phrases[1] == "")


@pytest.mark.parametrize("which", ["wide", "shipped", "small"])
def test_what_is_held_out_is_in_no_training_of_more_formats(which: str) -> None:
    split = load_split(which)
    tasks = trainable(split)
    assert {*split.sets["train"]} <= {task.name for task in tasks} | {*load_split().test}
    held_out = {name for of, names in split.sets.items() if of != "train" for name in names}
    assert not held_out & {task.name for task in tasks}
    assert not {*load_split().test, *load_split().sets["validation"]} & {t.name for t in tasks}
    assert contents_of(tasks) == contents_of([Task.parse(name) for name in split.sets["train"]])


def test_a_new_combination_stays_new() -> None:
    tasks = trainable(SPLIT)
    combinations = [task for task in HELD_OUT if novelty(task, TRAINED) == "combination"]
    assert len(combinations) == 18
    for task in combinations:
        assert novelty(task, tasks) == "combination"
        assert task.name in cells(task.content)


def _without_frame(wording: str) -> str:
    frame = next((frame for frame in FRAMES if wording.startswith(frame)), "")
    return wording.removeprefix(frame)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
