"""The test set as it was committed: wordings and a hundred rows of each test task of the wide zoo.

    python -m adapter_store.benchmarks.few_shot.held_out    # drew it, once; writes test_set.jsonl

Read from the file, so that no later release of a library that examples are drawn from changes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Example, Task
from loraplex_generation.zoo.wide_split import N_TEST_ROWS

__all__ = ["TEST_SET", "HeldOutTask", "digest_of_test_set", "drawn_test_set", "load_test_set"]

TEST_SET = Path(__file__).with_name("test_set.jsonl")


@dataclass(frozen=True, slots=True)
class HeldOutTask:
    task: Task
    wordings: tuple[str, ...]  # none of them was trained
    rows: tuple[Example, ...]


def load_test_set() -> dict[str, HeldOutTask]:
    """By name, in the order of the file."""
    found = {}
    for line in TEST_SET.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        rows = tuple(Example(*row) for row in data["rows"])
        found[data["task"]] = HeldOutTask(Task.parse(data["task"]), tuple(data["wordings"]), rows)
    return found


def digest_of_test_set() -> str:
    """SHA-256 of the committed file."""
    return hashlib.sha256(TEST_SET.read_bytes()).hexdigest()


def drawn_test_set() -> str:
    """What the file was written from."""
    lines = []
    for name in load_split("wide").sets["test"]:
        task = Task.parse(name)
        rows = [[e.prompt, e.answer] for e in task.examples("test", N_TEST_ROWS)]
        data = {"task": name, "wordings": task.test_descriptions(), "rows": rows}
        lines.append(json.dumps(data, ensure_ascii=False))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TEST_SET.write_text(drawn_test_set(), encoding="utf-8")
    print(digest_of_test_set())
