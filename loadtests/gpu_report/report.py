"""Runs the sections one after the other and keeps both report files complete meanwhile.

A report of the same device, base, packages and commit goes on where it was stopped.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .page import render

# A folder for its files → its result, as often as there is more of it.
Work = Callable[[Path], Iterable[Mapping[str, Any]]]


class Skipped(Exception):
    """Raised by a section that cannot run here; the message says why."""


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
        """Replace ``report.json`` and ``report.html`` atomically."""
        document = asdict(self)
        for name, text in (
            ("report.json", json.dumps(document, indent=1) + "\n"),
            ("report.html", render(document)),
        ):
            partial = folder / f".{name}.part"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


def done_before(report: Report, folder: Path) -> list[Section]:
    """Return the finished sections of an earlier run in ``folder`` with the same settings."""
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
    """Run all sections but those in ``kept``, also if one fails. ``kept`` stay in the report.

    Returns False on KeyboardInterrupt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {section.name: section for section in kept}
    others = [section for name, section in known.items() if name not in works]
    report.sections = [*others, *(known.get(name) or Section(name) for name in works)]
    report.write(folder)
    for section in report.sections:
        if section.name in known:
            if section.name in works:
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
