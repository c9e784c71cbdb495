"""The report while it grows: sections run one after the other, and both files are always whole.

A report of the same device, base, packages and commit goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .page import render

__all__ = ["Report", "Section", "Skipped", "done_before", "run_sections"]

# A folder for its files → its result, as often as there is more of it.
Work = Callable[[Path], Iterable[Mapping[str, Any]]]


class Skipped(Exception):
    """A section that cannot run here; the message says why."""


@dataclass
class Section:
    name: str
    state: str = "not run"  # running, done, failed, skipped, stopped
    seconds: float = 0.0
    why: str = ""  # of a section that is not done
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    commit: str
    started_at: str  # ISO 8601
    sections: list[Section] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """``report.json`` and ``report.html``; a reader never sees half of one."""
        document = asdict(self)
        for name, text in (
            ("report.json", json.dumps(document, indent=1) + "\n"),
            ("report.html", render(document)),
        ):
            partial = folder / f".{name}.part"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


def done_before(report: Report, folder: Path) -> list[Section]:
    """The sections that an earlier run in ``folder`` finished, if it was of the same things."""
    try:
        document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        same = all(
            document[name] == json.loads(json.dumps(getattr(report, name)))
            for name in ("device", "versions", "commit")
        )
        return [Section(**s) for s in document["sections"] if same and s["state"] == "done"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def run_sections(
    report: Report,
    works: Mapping[str, Work],
    folder: Path,
    *,
    kept: Iterable[Section] = (),
    say: Callable[[str], None] = print,
) -> bool:
    """Runs all but those in ``kept``, whatever becomes of one; False if somebody stopped it
    (KeyboardInterrupt)."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {section.name: section for section in kept}
    report.sections = [known.get(name) or Section(name) for name in works]
    report.write(folder)
    for section in report.sections:
        if section.name in known:
            say(f"{section.name}: done before; --anew runs it again")
            continue
        say(f"{section.name} …")
        section.state, began = "running", time.monotonic()
        report.write(folder)
        try:
            for result in works[section.name](folder):
                section.result = result
                report.write(folder)
            section.state = "done"
        except Skipped as why:
            section.state, section.why = "skipped", str(why)
        except KeyboardInterrupt:
            section.state, section.why = "stopped", "stopped from the keyboard"
            return False
        except Exception as error:
            section.state, section.why = "failed", f"{type(error).__name__}: {error}"[:2000]
        finally:
            section.seconds = round(time.monotonic() - began, 1)
            report.write(folder)
        say(f"{section.name}: {section.state} {section.why}".rstrip())
    return True
