"""The commands of a page, in their order, with what the page says they print.

A fence of `bash` or `python` is run. A fence of `text` right after it is its output, where `…`
stands for anything. `<!-- not run: why -->` before a fence says that it is shown only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["Example", "examples_of", "matches"]

_RUN = ("bash", "python")
_MARK = re.compile(r"<!-- not run: (.+) -->\s*")


@dataclass(frozen=True)
class Example:
    line: int  # of the fence, from 1
    language: str
    code: str
    not_run: str  # why; "" for one that is run
    output: str | None  # None: the page shows none


def examples_of(page: Path) -> list[Example]:
    """Raises ValueError for code that is neither run nor marked."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    found: list[Example] = []
    for index, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "code_block":
            raise ValueError(f"{page.name}:{line}: indented code is not run; make it a fence")
        if token.type != "fence" or token.info not in _RUN:
            continue
        before, after = tokens[index - 1], tokens[index + 1 : index + 2]
        mark = _MARK.fullmatch(before.content) if before.type == "html_block" else None
        shown = [t.content for t in after if t.type == "fence" and t.info == "text"]
        output = shown[0] if shown else None
        found.append(Example(line, token.info, token.content, mark[1] if mark else "", output))
    return found


def matches(shown: str, printed: str) -> bool:
    """Whether the page's output is what was printed, up to space at the ends of lines."""

    def lines(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    pattern = ".*?".join(map(re.escape, lines(shown).split("…")))
    return re.fullmatch(pattern, lines(printed), re.DOTALL) is not None
