"""Which tasks train, validate and test: drawn once by a seed, then fixed in a file.

`zoo.json` is the split of the shipped library, `wide.json` the one of `wide_split`, `small.json`
a dozen tasks of the first, for another base on one machine.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from .formats import FORMATS
from .tasks import Task
from .words import SPLITS

SPLIT_FILES = {"shipped": "zoo.json", "wide": "wide.json", "small": "small.json"}

_SEED = 20_26
_TRAINED_CONTENTS = (
    *(f"card.{language}" for language in ("en", "de", "fr", "es", "it")),
    *(f"ord.{language}" for language in ("en", "de")),
    *(f"date.{language}" for language in ("en", "de", "fr", "es")),
    "slash-date",
    *("last-first", "initials", "email"),
    *("list-first", "list-last", "list-reverse", "list-count"),
    *("record-name", "record-city", "record-amount"),
    *("plural", "past"),
)
_FORMATS_PER_CONTENT = 3  # of six, in the training set
_N_H1 = 10
_N_VALIDATION_H1 = 5
_H2 = (
    "ord.fr/plain",  # trained operation, trained language, never together
    "date.it/json",
    "username/plain",
    "list-second/quotes",
    "record-weekday/tag",
    "gerund/sentence",
)
_H3 = ("sentiment/plain", "minutes/plain", "minutes/quotes", "clock/json")
_VALIDATION_NEW = ("surname/plain", "us-date/tag", "larger/plain")


@dataclass(frozen=True, slots=True)
class ZooSplit:
    """The task names of each set, and the digest of every task's data and wordings."""

    sets: Mapping[str, tuple[str, ...]]  # "train", "validation", and those that test
    digests: Mapping[str, str]

    @property
    def test(self) -> tuple[str, ...]:
        tested = [names for of, names in self.sets.items() if of not in ("train", "validation")]
        return tuple(name for names in tested for name in names)

    def to_json(self) -> str:
        return json.dumps({"sets": dict(self.sets), "digests": dict(self.digests)}, indent=1)


def load_split(which: str = "shipped") -> ZooSplit:
    """The committed split; one of SPLIT_FILES. Nothing may be trained on another one."""
    data = json.loads(files(__package__).joinpath(SPLIT_FILES[which]).read_text())
    return ZooSplit(
        sets={of: tuple(names) for of, names in data["sets"].items()},
        digests=dict(data["digests"]),
    )


def draw_split() -> ZooSplit:
    """Draws the split: what `zoo.json` was written from, and a test's check of it.

    Formats are spread evenly over the contents of the training set; H1 and validation are drawn
    from the cells left over, at most one H1 cell per content and one per validation content.
    """
    rng = random.Random(_SEED)
    train, free = _deal_formats(rng)
    h1 = _draw_cells(rng, free, _N_H1)
    validation = _draw_cells(rng, [cell for cell in free if cell not in h1], _N_VALIDATION_H1)
    sets = {
        "train": tuple(train),
        "validation": (*validation, *_VALIDATION_NEW),
        "h1": tuple(h1),
        "h2": _H2,
        "h3": _H3,
    }
    names = [name for members in sets.values() for name in members]
    return ZooSplit(sets=sets, digests={name: task_digest(Task.parse(name)) for name in names})


def task_digest(task: Task, n_rows: int = 32) -> str:
    """Changes when the task's first `n_rows` examples of a split, wordings or dressing change."""
    parts = [task.name, *task.descriptions(), *task.test_descriptions()]
    for split in SPLITS:
        parts += [f"{e.prompt}\t{e.answer}" for e in task.examples(split, n_rows)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _deal_formats(rng: random.Random) -> tuple[list[str], list[str]]:
    contents = list(_TRAINED_CONTENTS)
    rng.shuffle(contents)
    names = list(FORMATS)
    train: list[str] = []
    for i, content in enumerate(contents):
        if i % 2 == 0:  # two contents share one dealing: each format occurs equally often
            rng.shuffle(names)
        half = names[:_FORMATS_PER_CONTENT] if i % 2 == 0 else names[_FORMATS_PER_CONTENT:]
        train += [f"{content}/{name}" for name in half]
    names = list(FORMATS)
    order = {content: i for i, content in enumerate(_TRAINED_CONTENTS)}
    train.sort(key=lambda cell: (order[cell.split("/")[0]], names.index(cell.split("/")[1])))
    grid = [f"{content}/{dressing}" for content in _TRAINED_CONTENTS for dressing in names]
    return train, [cell for cell in grid if cell not in set(train)]


def _draw_cells(rng: random.Random, free: list[str], n: int) -> list[str]:
    """`n` cells of distinct contents, the formats as even as can be."""
    cells = list(free)
    rng.shuffle(cells)
    chosen: list[str] = []
    while len(chosen) < n:
        used = [cell.split("/")[1] for cell in chosen]
        contents = {cell.split("/")[0] for cell in chosen}
        left = [cell for cell in cells if cell.split("/")[0] not in contents]
        chosen.append(min(left, key=lambda cell: used.count(cell.split("/")[1])))
    return chosen
