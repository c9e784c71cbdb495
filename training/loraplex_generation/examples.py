"""Pairs of a prompt and the right answer, and the files that hold them."""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import UnfitExamples


@dataclass(frozen=True, slots=True)
class Example:
    prompt: str  # the user's message
    answer: str  # the reply that the adapter should give


def read_pairs(path: Path) -> list[Example]:
    """Read JSON lines of ``{"prompt": …, "answer": …}``.

    Raises UnfitExamples, which names the line.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnfitExamples(f"line {number} is no JSON: {error}") from None
        if (
            not isinstance(data, dict)
            or set(data) != {"prompt", "answer"}
            or not all(isinstance(value, str) for value in data.values())
        ):
            raise UnfitExamples(f'line {number} must be {{"prompt": "…", "answer": "…"}}')
        pairs.append(Example(data["prompt"], data["answer"]))
    return pairs
