"""Reads the code blocks of a page: commands in order, their output, and data.

A fence of `bash` or `python` is a command. A fence of `text` right after it is its output, where
`…` stands for anything; elsewhere it is a drawing. `json`, `toml` and `yaml` are data.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

COMMANDS = ("bash", "python")
DATA = ("json", "toml", "yaml")
_MENTION = re.compile(r"(loraplex|make|python|pip|docker|helm|pytest|locust) (?!\+)\S.*")


@dataclass(frozen=True)
class Example:
    line: int  # of the fence, from 1
    language: str
    code: str
    output: str | None  # None: the page shows none

    @property
    def title(self) -> str:
        """The first line of the code."""
        return self.code.partition("\n")[0]


def examples_of(page: Path) -> list[Example]:
    """Raises ValueError for a block of which nobody knows what it is."""
    tokens = _tokens(page)
    found: list[Example] = []
    for index, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "code_block":
            raise ValueError(f"{page.name}:{line}: indented code is not run; make it a fence")
        if token.type != "fence":
            continue
        if token.info not in (*COMMANDS, *DATA, "text"):
            raise ValueError(f"{page.name}:{line}: a fence of {token.info!r} is not known here")
        shown = [t.content for t in tokens[index + 1 : index + 2] if t.info == "text"]
        output = shown[0] if shown else None
        found.append(Example(line, token.info, token.content, output))
    return found


def mentions_of(page: Path) -> list[tuple[int, str]]:
    """The commands within sentences and tables: line, code."""
    return [
        (token.map[0] + 1 if token.map else 0, child.content)
        for token in _tokens(page)
        for child in token.children or ()
        if child.type == "code_inline" and _MENTION.fullmatch(child.content)
    ]


def matches(shown: str, printed: str) -> bool:
    """Return True if the page shows what was printed, up to spaces at the ends of lines."""

    def lines(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    pattern = ".*?".join(map(re.escape, lines(shown).split("…")))
    return re.fullmatch(pattern, lines(printed), re.DOTALL) is not None


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
