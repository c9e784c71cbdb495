"""Every `loraplex` command and its options, from the command line's own declarations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer.main

from loraplex_server.cli.app import app

from .tables import cell, table

__all__ = ["commands_page"]

_HEAD = """# Commands

All that `loraplex` does, as `loraplex … --help` tells it. `loraplex --install-completion` makes the
shell complete commands, options, and the names of adapters of a server that runs.
"""


def commands_page() -> str:
    lines = [_HEAD]
    for path, command in _walk(typer.main.get_command(app), ("loraplex",)):
        if path == ("loraplex",):
            continue
        lines += [f"## {' '.join(path)}", "", inspect.cleandoc(command.help or ""), ""]
        if path == ("loraplex", "serve"):
            lines += ["Its options are the [settings](../settings.md).", ""]
            continue
        shown = [param for param in command.params if not getattr(param, "hidden", False)]
        rows = [_row(param) for param in shown if param.name != "help"]
        lines += table(("argument or option", "default", ""), rows)
    return "\n".join(lines)


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from _walk(sub, (*path, name))


def _row(param: Any) -> tuple[str, str, str]:
    if param.param_type_name == "argument":
        name = f"`{param.metavar or param.name.upper()}`"
    else:
        name = ", ".join(f"`{opt}`" for opt in (*param.opts, *param.secondary_opts))
    told = "Default:" in (param.help or "")
    if told or callable(param.default) or param.default in (None, (), [], False):
        shown = "needed" if param.required else ""
    else:
        shown = f"`{param.default}`"
    return name, shown, cell(param.help or "")
