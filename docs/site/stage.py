"""Copies the pages of ``docs/``, and what they link to, into one tree of Markdown.

On the site ``docs/`` is the root. A page that links to a file outside of it (a README of a package,
a table of numbers) takes that file along, below ``repository/``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

__all__ = ["rank_last", "rewrite_links", "stage"]

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)(\))")
_FENCE = re.compile(r"\s*(```|~~~)")
_AS_IT_IS = {".md", ".json", ".svg", ".png"}  # others are shown as plain text
_NO_PAGES = {"__pycache__", "site", "__init__.py"}
_HOME = PurePosixPath("docs/index.md")  # in place of the README
_LATE = ("adr/*.md", "repository/**/*.md", "reference/**/*.md")
_BOOST = 0.0001  # a match in a title counts 1,000 times as much as one in a text
_DECISIONS = PurePosixPath("docs/adr/README.md")  # a page that is made here


def stage(root: Path, out: Path) -> None:
    """Fills ``out``, which is made anew, from the repository at ``root``."""
    shutil.rmtree(out, ignore_errors=True)
    pages = [
        path.relative_to(root)
        for path in sorted((root / "docs").rglob("*"))
        if path.is_file() and not _NO_PAGES & set(path.relative_to(root).parts)
    ]
    todo = [PurePosixPath(page.as_posix()) for page in pages]
    done: set[PurePosixPath] = set()
    while todo:
        if (source := todo.pop()) in done:
            continue
        done.add(source)
        target = out / _place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(root / source, target)
            continue
        text, linked = rewrite_links((root / source).read_text(encoding="utf-8"), source, root)
        target.write_text(text, encoding="utf-8")
        todo += linked
    _index_of_decisions(out / "adr")


def rank_last(pages: Path) -> None:
    """Rank decisions, READMEs of packages and generated pages behind others in the search."""
    for pattern in _LATE:
        for page in sorted(pages.glob(pattern)):
            text = page.read_text(encoding="utf-8")
            page.write_text(f"---\nsearch:\n  boost: {_BOOST}\n---\n{text}", encoding="utf-8")


def rewrite_links(text: str, source: PurePosixPath, root: Path) -> tuple[str, list[PurePosixPath]]:
    """The page with links that hold on the site, and the files of the repository it links to.

    ``source``: the page's path in the repository. Links that lead nowhere stay: MkDocs names them.
    """
    linked: list[PurePosixPath] = []

    def rewrite(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        path, mark, anchor = link.partition("#")
        if not path or ":" in path:
            return match[0]
        target = _target(source.parent, path, root)
        if target is None:
            return match[0]
        if target != _DECISIONS:
            linked.append(target)
        relative = os.path.relpath(_place(target), _place(source).parent)
        return f"{before}{PurePosixPath(relative)}{mark}{anchor}{after}"

    lines, fenced = [], False
    for line in text.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else _LINK.sub(rewrite, line))
    return "\n".join(lines), linked


def _target(folder: PurePosixPath, path: str, root: Path) -> PurePosixPath | None:
    """The file of the repository that a relative link means; None if there is none."""
    found = PurePosixPath(os.path.normpath(folder / path))
    if found == PurePosixPath("README.md"):
        return _HOME
    if found == _DECISIONS.parent:
        return _DECISIONS
    if (root / found).is_dir():
        found /= "README.md"
    return found if (root / found).is_file() and ".." not in found.parts else None


def _place(source: PurePosixPath) -> PurePosixPath:
    """Return the path on the site of a file of the repository."""
    if source.parts[0] == "docs":
        return PurePosixPath(*source.parts[1:])
    place = PurePosixPath("repository") / source
    return place if source.suffix in _AS_IT_IS else place.with_name(f"{place.name}.txt")


def _index_of_decisions(folder: Path) -> None:
    lines = ["# Decisions", "", "Choices that somebody will ask about, and their reasons.", ""]
    for page in sorted(folder.glob("[0-9]*.md")):
        title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({page.name})")
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
