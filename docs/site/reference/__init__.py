"""Pages of the site that the code tells itself, so that they cannot be out of date."""

from __future__ import annotations

from pathlib import Path

from .commands import commands_page
from .error_codes import error_codes_page
from .http_api import http_api_page
from .metric_families import metrics_page
from .python_api import python_api_page
from .running_front import running_front

__all__ = ["write_reference"]


def write_reference(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with running_front() as front:
        pages = {
            "http.md": http_api_page(front.app.openapi()),
            "metrics.md": metrics_page(front.app.state.parts.registry),
            "commands.md": commands_page(),
            "errors.md": error_codes_page(),
            "python.md": python_api_page(),
        }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
