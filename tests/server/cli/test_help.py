"""Every command explains itself."""

import re
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from loraplex_server.cli.app import app


def _commands() -> Iterator[tuple[str, ...]]:
    def walk(group: typer.Typer, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for command in group.registered_commands:
            function = command.callback
            name = command.name or (function.__name__.replace("_", "-") if function else "")
            yield (*path, name)
        for sub in group.registered_groups:
            if sub.typer_instance is not None:
                name = sub.name or sub.typer_instance.info.name
                yield from walk(sub.typer_instance, (*path, str(name)))

    yield from walk(app, ())


@pytest.mark.parametrize("path", list(_commands()), ids=lambda path: " ".join(path) or "loraplex")
def test_help_is_printed(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_help_keeps_brackets_and_says_which_way_a_flag_turns() -> None:
    lines = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80"}).output
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", lines).split())
    assert "flashinfer (loraplex[flashinfer])" in text
    assert re.search(r"--no-demos .{0,80}Default: on; this turns it off", text)


@pytest.mark.parametrize("path", list(_commands()), ids=lambda path: " ".join(path) or "loraplex")
def test_help_fits_80_columns_and_cuts_no_word(path: tuple[str, ...]) -> None:
    printed = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
