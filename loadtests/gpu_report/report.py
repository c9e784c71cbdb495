"""The report while it grows: sections run one after the other, and both files are always whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .page import render

__all__ = ["Report", "Section", "Skipped", "run_sections"]

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


def run_sections(
    report: Report, works: Mapping[str, Work], folder: Path, *, say: Callable[[str], None] = print
) -> bool:
    """Runs all, whatever becomes of one; False if somebody stopped it (KeyboardInterrupt)."""
    folder.mkdir(parents=True, exist_ok=True)
    report.sections = [Section(name) for name in works]
    report.write(folder)
    for section in report.sections:
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
