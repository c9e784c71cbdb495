"""`loraplex serve`: one base model, many adapters, the OpenAI API."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from loraplex_server.options import Option
from loraplex_server.settings_page import default_of
from loraplex_server.settings_sources import server_options

__all__ = ["serve"]

_SPINS = 3000  # tens of microseconds: longer than the gaps within a step, shorter than between two


def serve(config: Path | None, **flags: Any) -> None:
    """Serve a base model and its adapters over the OpenAI API.

    Flags win over LORAPLEX_* variables (as LORAPLEX_MAX_MODEL_LEN), those over --config.
    """
    try:
        _serve(given_flags(flags), config)
    except KeyboardInterrupt:  # before the server has taken over the signals
        raise typer.Exit(130) from None


def given_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """Options by name, of what typer makes of the command line: what was not given is left out."""
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    for option in server_options():
        if option.is_flag and given.pop(_off(option), False):
            if option.name in given:
                raise typer.BadParameter(
                    f"--{option.dashed} and --no-{option.dashed} are both given"
                )
            given[option.name] = False
    return given


def _serve(flags: dict[str, object], config: Path | None) -> None:
    # Else libgomp's threads spin through everything that Python does between two steps, on the
    # cores that the HTTP front waits for. Read once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))

    from loraplex_server.listening import bind
    from loraplex_server.settings import ConfigError
    from loraplex_server.settings_sources import resolve_config

    try:
        resolved = resolve_config(flags, config)
        listening = bind(resolved.http)  # a port in use is told before the model is loaded
    except (ConfigError, OSError) as error:
        raise _failed(error) from None

    from loraplex_adapter_store.errors import StoreError
    from loraplex_server.launch import serve as serve_http
    from loraplex_server.logs import set_up_logging
    from loraplex_server.model.errors import ModelError

    try:
        set_up_logging(resolved.http)
        serve_http(resolved, listening, say=typer.echo)
    except (ModelError, StoreError, ValueError, OSError) as error:
        raise _failed(error) from None


def _failed(error: Exception) -> typer.Exit:
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(1)


def _parameters(option: Option) -> list[inspect.Parameter]:
    """Texts are parsed by the settings, as those of the environment and the file are."""
    if option.is_flag:
        # The environment or the file may have set it either way, so there are both forms; the help
        # shows the one that changes the default.
        is_on = bool(option.info.default)
        return [
            _parameter(option, option.name, bool, hidden=is_on),
            _parameter(option, _off(option), bool, hidden=not is_on),
        ]
    is_list = isinstance(option.info.default, tuple) and option.name != "keys"
    return [_parameter(option, option.name, list[str] if is_list else str)]


def _parameter(option: Option, name: str, kind: Any, *, hidden: bool = False) -> inspect.Parameter:
    # Defaults stand in the help alone: a flag that was not given must not hide the file's value.
    info = typer.Option(
        f"--{name.replace('_', '-')}",
        help=_help(option),
        rich_help_panel=str(option.panel),
        show_default=False,
        metavar=option.metavar or (None if option.is_flag else _metavar(option)),
        hidden=option.hidden or hidden,
    )
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _off(option: Option) -> str:
    return f"no_{option.name}"


def _metavar(option: Option) -> str:
    kinds = [
        (get_args(kind) or (kind,))[0]  # of an Annotated the type
        for kind in get_args(option.info.annotation) or (option.info.annotation,)
    ]
    return "N" if int in kinds else "SECONDS" if float in kinds else "TEXT"


def _help(option: Option) -> str:
    default = default_of(option)
    return f"{option.help} Default: {default}." if default else option.help


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options, e.g. `max-model-len: 2048`.",
            exists=True,
            dir_okay=False,
        ),
    ],
)

# Typer reads the parameters here: they are the options, declared by their owners.
_PARAMETERS = [*chain.from_iterable(map(_parameters, server_options())), _CONFIG]
serve.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
serve.__annotations__ = {each.name: each.annotation for each in _PARAMETERS}
