"""Checks that commands that no test runs exist.

Its program is known, and what it names exists: commands and options of `loraplex`, targets and
variables of the Makefile, modules and their options, files, extras, values of the Helm chart.
"""

import ast
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml
from typer.main import get_command

from loraplex_server.cli.app import app
from loraplex_server.settings.sources import server_options
from loraplex_server.settings.vllm_flags import our_flags

ROOT = Path(__file__).parents[2]
_QUOTED_OR_COMMENT = re.compile(r"""'[^']*'|"[^"]*"|(?<!\S)\#[^\n]*""")
_PLACEHOLDER = re.compile(r"[A-Z]|.*[/…:].*")  # a name or a path of the reader's


class NotReal(Exception):
    """Says which word of a command is wrong."""


def check_commands(code: str, *, whole: bool = True) -> None:
    """``whole``: nothing that a command requires is left out. Raises NotReal."""
    for words in _commands(code):
        while words and re.match(r"[A-Z_]+=", words[0]):
            _check_variable(words.pop(0))
        if not words:
            continue
        arguments, program = words[1:], Path(words[0]).name  # also that of a virtual environment
        if program not in _CHECKS:
            raise NotReal(f"{program} is no program that a page may use: {' '.join(words)}")
        _CHECKS[program](arguments, whole)


def _commands(code: str) -> Iterator[list[str]]:
    text = _QUOTED_OR_COMMENT.sub(lambda match: "" if match[0][0] == "#" else match[0], code)
    text = text.replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.commenters, lexer.whitespace, lexer.whitespace_split = "", " \t", True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|\n"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def _check_variable(assignment: str) -> None:
    variable = assignment.partition("=")[0]
    options = {option.name.upper().replace("-", "_") for option in server_options()}
    if variable.startswith("LORAPLEX_") and variable.removeprefix("LORAPLEX_") not in options:
        raise NotReal(f"{variable} is no variable of the server")


def _check_loraplex(arguments: list[str], whole: bool) -> None:
    command = _command()
    context = command.make_context("loraplex", ["--help"], resilient_parsing=True)
    path = ["loraplex"]
    while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
        names = arguments.pop(0).split("|")  # "add|list" stands for both
        found = [command.get_command(context, name) for name in names]
        if None in found:
            raise NotReal(f"{' '.join(path)} has no command {names}")
        (command, path) = (found[0], [*path, names[0]])
        if len(names) > 1:
            return
    if path == ["loraplex", "bench"]:  # hands its arguments on
        options = [word for word in arguments if word.startswith("--") and word != "--help"]
        _check_python(["-m", "loadtests.run", *options], whole)
        return
    if path == ["loraplex", "serve"]:
        arguments, _ = our_flags(arguments)
    context = command.make_context(path[-1], ["--help"], parent=context, resilient_parsing=True)
    context.resilient_parsing = False  # it was for the --help alone, and forgives too much
    parser = command.make_parser(context)
    try:
        values, left, _ = parser.parse_args(args=list(arguments))
    except Exception as error:  # Typer's own copy of click has no public names
        if not whole and "requires an argument" in str(error):
            return  # `loraplex adapters convert --initial`
        raise NotReal(f"{' '.join(path)}: {error}") from error
    if left:
        raise NotReal(f"{' '.join(path)} does not take {left}")
    for parameter in command.params:
        given = values.get(parameter.name)
        if whole and parameter.required and given in (None, ()):
            raise NotReal(f"{' '.join(path)} needs {parameter.name}")


@cache
def _command() -> Any:
    return get_command(app)


def _check_make(arguments: list[str], whole: bool) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        if f"$({name})" not in text if is_variable else f"\n{name}:" not in text:
            raise NotReal(f"make has no {name}")


def _check_python(arguments: list[str], whole: bool) -> None:
    if arguments[:2] == ["-m", "pytest"]:
        _check_pytest(arguments[2:], whole)
        return
    if arguments[:2] == ["-m", "venv"] or arguments[:1] == ["-c"]:
        return
    if arguments[0] == "-m":
        file, arguments = _module(arguments[1]), arguments[2:]
    else:
        file, arguments = ROOT / arguments[0], arguments[1:]
        if not file.is_file():
            raise NotReal(f"there is no {file.relative_to(ROOT)}")
    known = _words_of(file)
    subcommand = next(iter(arguments), "-")
    for word in arguments:
        is_option = word.startswith("--")
        named = word.partition("=")[0] if is_option else word
        ours = is_option or (word is subcommand and not word.startswith("-"))
        if ours and not (named in known or _PLACEHOLDER.match(named)):
            raise NotReal(f"{file.relative_to(ROOT)} does not know {named}")


def _module(name: str) -> Path:
    parts = Path(*name.split("."))
    packages = ("server", "kernels", "adapter_store", "training", "router")
    for root in (ROOT, *(ROOT / part for part in packages)):
        for file in (root / parts.with_suffix(".py"), root / parts / "__main__.py"):
            if file.is_file():
                return file
    raise NotReal(f"there is no module {name} that runs")


@cache
def _words_of(file: Path) -> frozenset[str]:
    """Literals and names of functions, and for Typer's options those of parameters."""
    words: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
        elif isinstance(node, ast.FunctionDef):
            words |= {node.name, node.name.replace("_", "-")}
            options = (*node.args.args, *node.args.kwonlyargs)
            words |= {f"--{option.arg.replace('_', '-')}" for option in options}
    return frozenset(words)


def _check_pytest(arguments: list[str], whole: bool) -> None:
    for word in arguments:
        if word.startswith("tests") and not (ROOT / word).exists():
            raise NotReal(f"there is no {word}")


def _check_pip(arguments: list[str], whole: bool) -> None:
    if arguments[:1] != ["install"]:
        raise NotReal(f"pip {arguments}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for word in arguments:
        match = re.fullmatch(r"(?:loraplex|\.)\[([\w,-]+)\]", word)
        for extra in match[1].split(",") if match else ():
            if extra not in extras:
                raise NotReal(f"loraplex has no extra {extra}")


def _check_docker(arguments: list[str], whole: bool) -> None:
    match arguments:
        case ["build", *options]:
            file = ROOT / (_values(options, "-f") or ["Dockerfile"])[0]
            if not file.is_file():
                raise NotReal(f"there is no {file.name}")
            for value in _values(options, "--build-arg"):
                if f"ARG {value.partition('=')[0]}" not in file.read_text(encoding="utf-8"):
                    raise NotReal(f"{file.name} has no argument {value}")
        case ["run", *options]:
            for value in _values(options, "-e"):
                _check_variable(value)
        case ["compose", *_]:
            if not (ROOT / "docker-compose.yml").is_file():
                raise NotReal("there is no docker-compose.yml")
        case ["push" | "stop", *_]:
            pass
        case _:
            raise NotReal(f"docker {arguments}")


def _check_helm(arguments: list[str], whole: bool) -> None:
    """Renders the chart: its schema refuses values that it does not know."""
    if arguments[:1] != ["install"]:
        raise NotReal(f"helm {arguments}")
    values: dict[str, Any] = {}
    for name in _values(arguments, "-f"):
        _merge(values, yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))
    for assignment in _values(arguments, "--set"):
        path, _, value = assignment.partition("=")
        nested: Any = yaml.safe_load(value)
        for key in reversed(path.split(".")):
            nested = {key: nested}
        _merge(values, nested)
    try:
        with helm.Chart.load(ROOT / arguments[2]) as chart:
            files = chart.render(values, name=arguments[1], namespace="default")
    except Exception as error:
        raise NotReal(f"helm {' '.join(arguments)}: {error}") from error
    if not any(yaml.safe_load_all(text) for text in files.values()):
        raise NotReal(f"helm {' '.join(arguments)} installs nothing")


def _merge(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _check_kubectl(arguments: list[str], whole: bool) -> None:
    if arguments[:3] != ["create", "secret", "generic"]:
        raise NotReal(f"kubectl {arguments}")


def _check_serve(arguments: list[str], whole: bool) -> None:
    """Check Ray Serve's own command, whose application must be ours."""
    if arguments[0] not in ("start", "run"):
        raise NotReal(f"serve {arguments}")
    for word in arguments:
        module, separator, name = word.partition(":")
        if separator and module.startswith("loraplex_"):
            file = ROOT / "server" / Path(*module.split(".")) / "__init__.py"
            if not file.is_file() or name not in _words_of(file):
                raise NotReal(f"there is no application {word}")


def _check_locust(arguments: list[str], whole: bool) -> None:
    _check_file(_values(arguments, "-f"), whole)


def _check_file(arguments: list[str], whole: bool) -> None:
    for name in arguments:
        if not (ROOT / name).is_file():
            raise NotReal(f"there is no {name}")


def _check_pre_commit(arguments: list[str], whole: bool) -> None:
    _check_file([".pre-commit-config.yaml"], whole)


def _anything(arguments: list[str], whole: bool) -> None:
    """A program of the system, of which nothing of ours is named."""


def _values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


_CHECKS: Mapping[str, Callable[[list[str], bool], None]] = {
    "loraplex": _check_loraplex,
    "make": _check_make,
    "python": _check_python,
    "pytest": _check_pytest,
    "pip": _check_pip,
    "docker": _check_docker,
    "helm": _check_helm,
    "kubectl": _check_kubectl,
    "serve": _check_serve,
    "locust": _check_locust,
    "pre-commit": _check_pre_commit,
    "git": _anything,
    "cd": _anything,
}
