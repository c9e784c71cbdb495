"""The wide zoo: hundreds of tasks, and a test set of operations that nobody has trained or scored.

Drawn once by a seed, then fixed in `wide.json`. By operation: what is tested was never trained, but
for the few new combinations. Some of the new operations lie between trained ones (`novelty`).
"""

import random
from collections.abc import Iterator

from .cells import cells
from .families import FAMILIES
from .split import ZooSplit, load_split, task_digest
from .tasks import Task

N_TEST_ROWS = 100  # of each test task

_SEED = 2_611
_HELD_OUT = ("test", "validation")
_N_FAMILIES = {"test": 3, "validation": 2}  # families of which nothing is trained
_FAMILY_SIZE = range(5, 10)  # of these
_OF_A_FAMILY = 4  # tasks of each of these
_LEAST = {"test": 6, "validation": 10}  # operations of a family from which one is held out
_N_COMBINATIONS = {"test": 12, "validation": 6}


def draw_wide_split() -> ZooSplit:
    """What `wide.json` was written from, and a test's check of it.

    Training keeps the tasks of the shipped library, and has each further operation in one format.
    """
    rng = random.Random(_SEED)
    drawing = _Drawing(rng)
    drawing.hold_out_families()
    drawing.hold_out_places()
    drawing.hold_out_operations()
    drawing.hold_out_languages()
    known = drawing.trained()
    grid = {content: cells(content) for content in known}
    for names in grid.values():
        rng.shuffle(names)
    train = [names.pop() for names in grid.values()]
    sets = {"train": (*load_split().sets["train"], *train)}
    for part in _HELD_OUT:
        new = [rng.choice(cells(content)) for content in drawing.held[part]]
        free = rng.sample([c for c in known if grid[c]], _N_COMBINATIONS[part])
        sets[part] = (*new, *[grid[content].pop() for content in free])
    return ZooSplit(
        sets=sets,
        digests={
            name: task_digest(Task.parse(name), N_TEST_ROWS if part == "test" else 32)
            for part, names in sets.items()
            for name in names
        },
    )


class _Drawing:
    """Contents (operation, or operation.language) on their way into the held-out sets."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.held: dict[str, list[str]] = {part: [] for part in _HELD_OUT}
        self._members: dict[str, list[str]] = {}  # family → operations
        for name, operation in FAMILIES.items():
            self._members.setdefault(operation.family, []).append(name)

    def trained(self) -> list[str]:
        """What is left."""
        gone = {content for contents in self.held.values() for content in contents}
        names = [name for members in self._members.values() for name in members]
        return [c for name in names for c in _contents(name) if c not in gone]

    def hold_out_families(self) -> None:
        trained = {Task.parse(name).family for name in load_split().sets["train"]}
        free = [
            family
            for family, members in self._members.items()
            if len(members) in _FAMILY_SIZE and family not in trained
        ]
        for part in _HELD_OUT:
            for family in self._rng.sample(free, _N_FAMILIES[part]):
                free.remove(family)
                members = self._members.pop(family)
                self.held[part] += self._rng.sample(members, _OF_A_FAMILY)

    def hold_out_places(self) -> None:
        """A number inside each series, for the test and for validation in turn."""
        turn = 0
        for names in self._series():
            if len(names) < 3:
                continue
            self.held[_HELD_OUT[turn % 2]].append(self._rng.choice(names[1:-1]))
            turn += 1

    def hold_out_operations(self) -> None:
        for members in self._members.values():
            single = [n for n in members if not FAMILIES[n].series and _contents(n) == [n]]
            for part in _HELD_OUT:
                if len(single) >= _LEAST[part]:
                    name = self._rng.choice(single)
                    single.remove(name)
                    self.held[part].append(name)

    def hold_out_languages(self) -> None:
        for members in self._members.values():
            for name in members:
                if len(contents := _contents(name)) > 1:
                    for part, content in zip(_HELD_OUT, self._rng.sample(contents, 2), strict=True):
                        self.held[part].append(content)

    def _series(self) -> Iterator[list[str]]:
        """The names of each, by their number."""
        groups: dict[str, list[str]] = {}
        for members in self._members.values():
            for name in members:
                if FAMILIES[name].series:
                    groups.setdefault(FAMILIES[name].series, []).append(name)
        for names in groups.values():
            yield sorted(names, key=lambda name: FAMILIES[name].place)


def _contents(name: str) -> list[str]:
    return [f"{name}.{code}" if code else name for code in FAMILIES[name].languages]
