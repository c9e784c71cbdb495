"""The wide zoo, its splits by operation, and the test set as committed."""

import ast
import json
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import pytest
import yaml
from dateutil import parser
from dateutil.relativedelta import relativedelta
from lxml import html
from markdown_it import MarkdownIt

from research.zoo.novelty import NOVELTIES, novelty
from research.zoo.operations import FIRST, OPERATIONS
from research.zoo.split import draw_split, load_split, task_digest
from research.zoo.tasks import Task
from research.zoo.wide_split import N_TEST_ROWS, draw_wide_split

SPLIT = load_split("wide")
TASKS = {of: [Task.parse(name) for name in names] for of, names in SPLIT.sets.items()}
EVERY = [task for tasks in TASKS.values() for task in tasks]
SPLITS = ("train", "validation", "test")


def test_the_committed_split_is_the_one_that_the_seed_draws() -> None:
    assert draw_wide_split() == SPLIT


def test_the_shipped_library_keeps_its_tasks() -> None:
    assert draw_split() == load_split("shipped")
    assert set(load_split("shipped").sets["train"]) <= set(SPLIT.sets["train"])


def test_there_are_hundreds_of_tasks_and_none_is_in_two_sets() -> None:
    assert len(TASKS["train"]) >= 250
    assert len(TASKS["validation"]) >= 40
    assert len(TASKS["test"]) >= 60
    assert len(set(EVERY)) == len(EVERY)
    assert len({task.operation for task in EVERY}) >= 500


def test_what_is_tested_is_new_and_most_of_it_is_a_new_operation() -> None:
    kinds = Counter(novelty(task, TASKS["train"]) for task in TASKS["test"])
    assert kinds["trained"] == 0
    assert set(kinds) == set(NOVELTIES[1:])
    assert kinds["combination"] <= 12
    assert kinds["interpolation"] >= 15
    assert kinds["operation"] + kinds["family"] >= 40


def test_validation_and_test_share_no_content_but_trained_ones() -> None:
    trained = {task.content for task in TASKS["train"]}
    both = {t.content for t in TASKS["validation"]} & {t.content for t in TASKS["test"]}
    assert both <= trained


def test_an_interpolation_lies_between_two_trained_numbers_of_its_series() -> None:
    for task in TASKS["test"]:
        if novelty(task, TASKS["train"]) == "interpolation":
            asked = OPERATIONS[task.operation]
            known = [OPERATIONS[t.operation] for t in TASKS["train"]]
            places = {k.place for k in known if k.series == asked.series}
            assert asked.place not in places
            assert min(places) < asked.place < max(places)


def test_no_operation_that_tested_the_shipped_library_is_trained() -> None:
    old = {Task.parse(name).content for of in ("h2", "h3") for name in load_split().sets[of]}
    assert not old & {task.content for task in TASKS["train"]}


def test_every_test_task_has_a_hundred_rows_of_inputs_that_no_training_row_has() -> None:
    for task in TASKS["test"]:
        prompts = {row.prompt for row in task.examples("test", N_TEST_ROWS)}
        assert len(prompts) == N_TEST_ROWS
        assert not prompts & {e.prompt for e in task.examples("train", 100)}
        assert len(task.test_descriptions()) == 6


def test_wordings_of_held_out_tasks_occur_in_no_training_wording() -> None:
    trained = {wording for task in TASKS["train"] for wording in task.descriptions()}
    for task in TASKS["test"]:
        assert not trained & set(task.test_descriptions())
    for task in EVERY:
        assert not set(task.descriptions()) & set(task.test_descriptions())
        assert all("{" not in text or "}" in text for text in task.descriptions())


def test_no_two_formats_of_an_operation_ask_for_the_same_answers() -> None:
    """If one did, a "new combination" would be a trained task."""
    by_content: dict[str, list[Task]] = {}
    for task in (*TASKS["validation"], *TASKS["test"], *TASKS["train"]):
        if task.operation not in FIRST:
            by_content.setdefault(task.content, []).append(task)
    for tasks in (several for several in by_content.values() if len(several) > 1):
        answers = [tuple(e.answer for e in task.examples("test", 20)) for task in tasks]
        assert len(set(answers)) == len(answers)


def test_no_constant_answer_is_right_on_most_rows() -> None:
    for task in TASKS["test"]:
        rows = task.examples("test", N_TEST_ROWS)
        most = Counter(row.answer for row in rows).most_common(1)[0][1]
        assert most <= 0.75 * len(rows), task.name


def test_answers_as_json_are_json() -> None:
    for task in EVERY:
        if task.format == "json":
            for row in task.examples("train", 12):
                assert set(json.loads(row.answer, strict=False)) == {"result"}


def test_digests_of_a_sample_still_hold() -> None:
    for task in EVERY[::23]:
        n_rows = N_TEST_ROWS if task in TASKS["test"] else 32
        assert task_digest(task, n_rows) == SPLIT.digests[task.name]


def _text_of(markup: str) -> str:
    return str(html.fromstring(markup).text_content())


def _first_inline(text: str) -> str:
    return MarkdownIt().render(text).strip()


def _later(days: int) -> Callable[[str], str]:
    return lambda p: (date.fromisoformat(p) + relativedelta(days=days)).isoformat()


ORACLES: dict[str, Callable[[str, str], bool]] = {  # by parsers and libraries that are not ours
    "html-li": lambda p, a: _text_of(a) == p and a.startswith("<li>"),
    "html-strong": lambda p, a: html.fromstring(a).tag == "strong" and _text_of(a) == p,
    "bold": lambda p, a: _first_inline(a) == f"<p><strong>{p}</strong></p>",
    "code": lambda p, a: _first_inline(a) == f"<p><code>{p}</code></p>",
    "heading-2": lambda p, a: _first_inline(a) == f"<h2>{p}</h2>",
    "block-quote": lambda p, a: _text_of(_first_inline(a)).strip() == p,
    "list-numbers": lambda p, a: (
        [_text_of(e) for e in _first_inline(a).splitlines()[1:-1]] == p.split(", ")
    ),
    "yaml": lambda p, a: yaml.safe_load(a) == {"title": p},
    "toml": lambda p, a: tomllib.loads(a) == {"title": p},
    "json-list": lambda p, a: json.loads(a) == [p],
    "python-print": lambda p, a: ast.literal_eval(a.removeprefix("print")) == p,
    "shell-echo": lambda p, a: shlex.split(a) == ["echo", p],
    "url-host": lambda p, a: urlsplit(p).netloc == a,
    "url-path": lambda p, a: urlsplit(p).path == a,
    "file-stem": lambda p, a: PurePosixPath(p).stem == a,
    "file-folder": lambda p, a: str(PurePosixPath(p).parent) == a,
    "binary": lambda p, a: int(a, 2) == int(p),
    "octal": lambda p, a: int(a, 8) == int(p),
    "hexadecimal": lambda p, a: int(a, 16) == int(p),
    "scientific": lambda p, a: abs(float(a) / int(p) - 1) < 0.06,
    "times-3": lambda p, a: int(a) == int(p) + int(p) + int(p),
    "round-to-100": lambda p, a: abs(int(a) - int(p)) <= 50 and int(a) % 100 == 0,
    "dot-date": lambda p, a: parser.parse(a, dayfirst=True) == parser.parse(p),
    "us-slash-date": lambda p, a: parser.parse(a, dayfirst=False) == parser.parse(p),
    "abbreviated-date": lambda p, a: parser.parse(a) == parser.parse(p),
    "days-later-7": lambda p, a: _later(7)(p) == a,
    "days-earlier-2": lambda p, a: _later(-2)(p) == a,
    "month-end": lambda p, a: (date.fromisoformat(p) + relativedelta(day=31)).isoformat() == a,
    "leap-year": lambda p, a: (
        ((datetime.fromisoformat(p) + relativedelta(month=2, day=31)).day == 29) == (a == "yes")
    ),
    "time-am-pm": lambda p, a: parser.parse(a).time() == parser.parse(p).time(),
    "minutes-later-30": lambda p, a: (
        (parser.parse(p) + relativedelta(minutes=30)).time() == parser.parse(a).time()
    ),
}


@pytest.mark.parametrize("operation", ORACLES)
def test_answers_are_what_other_programs_make_of_them(operation: str) -> None:
    rows = Task.parse(f"{operation}/plain").examples("train", 24)
    assert len(rows) == 24
    for row in rows:
        assert ORACLES[operation](row.prompt, row.answer), row


KNOWN = {  # prompt → answer, by hand; looked for among the rows that are drawn
    "roman": {"49": "XLIX", "94": "XCIV", "388": "CCCLXXXVIII"},
    "ordinal-suffix": {"11": "11th", "22": "22nd", "103": "103rd", "112": "112th", "1": "1st"},
    "word-reverse": {"school": "loohcs", "garden": "nedrag"},
    "pig-latin": {"school": "oolschay", "animal": "animalay"},
    "month-name.de": {},
}


def test_answers_that_we_know_by_hand() -> None:
    for operation, known in KNOWN.items():
        rows = {
            e.prompt: e.answer
            for of in SPLITS
            for e in Task.parse(f"{operation}/plain").examples(of, 600)
        }
        for prompt, answer in known.items():
            assert rows[prompt] == answer
    germans = {e.answer for e in Task.parse("month-name.de/plain").examples("train", 200)}
    assert {"März", "Dezember"} <= germans
    assert len(germans) == 12
