"""`loraplex serve`: one base model, many adapters, the OpenAI API."""

import inspect
import logging
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from loraplex_server.options import Option
from loraplex_server.settings.config import ConfigError
from loraplex_server.settings.sources import server_options
from loraplex_server.settings.vllm_flags import our_flags

from .failed import failed
from .pull import pull_missing_default

_NOTES = "notes"  # on flags that were left out; key of the context's meta
_log = logging.getLogger(__name__)
_SPINS = 3000  # tens of microseconds: longer than gaps within a step, shorter than between steps


class ServeCommand(TyperCommand):
    """`loraplex serve` also takes the flags of vLLM, as docs/coming-from.md lists them."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        try:
            ours, ctx.meta[_NOTES] = our_flags(args)
        except ConfigError as error:
            raise failed(error) from None
        return super().parse_args(ctx, ours)


def serve(ctx: typer.Context, base: str | None, config: Path | None, **flags: Any) -> None:
    """Serve a base model and its adapters over the OpenAI API.

    Flags win over LORAPLEX_* variables (such as LORAPLEX_MAX_MODEL_LEN), which win over --config.
    The flags of `vllm serve` are accepted, too.
    """
    given = given_flags(flags)
    if base is not None and given.setdefault("model", base) != base:
        raise typer.BadParameter(f"the model is given twice: {base} and --model {given['model']}")
    try:
        _serve(given, config, ctx.meta[_NOTES])
    except KeyboardInterrupt:  # before the server has taken over the signals
        raise typer.Exit(130) from None


def given_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the options of the command line by name, without those that were not given."""
    options = {name: value for name, value in flags.items() if value not in (None, [], ())}
    for option in server_options():
        if option.is_flag and options.pop(_off(option), False):
            if option.name in options:
                raise typer.BadParameter(
                    f"--{option.dashed} and --no-{option.dashed} are both given"
                )
            options[option.name] = False
    return options


def set_thread_defaults() -> None:
    """Set how libraries use threads, unless the environment does. Call it before torch's import."""
    # By default libgomp's threads spin between two steps, on the cores that the HTTP side needs.
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    # By default the tokenizer has threads of its own, without priorities and shares of tenants.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _serve(flags: dict[str, object], config: Path | None, notes: list[str]) -> None:
    set_thread_defaults()

    from loraplex_server.listening import bind
    from loraplex_server.settings.sources import resolve_config

    try:
        resolved = resolve_config(flags, config)
        listening = bind(resolved.http)  # fails for a used port before the model is loaded
    except (ConfigError, OSError) as error:
        raise failed(error) from None

    from loraplex_adapter_store.errors import StoreError
    from loraplex_server.launch import serve as serve_http
    from loraplex_server.logs import set_up_logging
    from loraplex_server.model.errors import ModelError

    try:
        with listening:
            set_up_logging(resolved.http)
            for note in notes:
                _log.info(note)
            if resolved.model is None:
                pull_missing_default()
            serve_http(resolved, listening, say=typer.echo)
    except (ModelError, StoreError, ValueError, OSError) as error:
        raise failed(error) from None


def _parameters(option: Option) -> list[inspect.Parameter]:
    """Return the command line parameters of an option. The settings parse their texts."""
    if option.is_flag:
        # Both forms exist, because the environment or the file may have set the switch. The help
        # shows the form that changes the default.
        is_on = bool(option.info.default)
        return [
            _parameter(option, option.name, bool, hidden=is_on),
            _parameter(option, _off(option), bool, hidden=not is_on),
        ]
    is_list = isinstance(option.info.default, tuple) and option.name != "keys"
    return [_parameter(option, option.name, list[str] if is_list else str)]


def _parameter(option: Option, name: str, kind: Any, *, hidden: bool = False) -> inspect.Parameter:
    # Defaults are only in the help: a flag that was not given must not hide the file's value.
    info = typer.Option(
        f"--{name.replace('_', '-')}",
        help=_help(option, name),
        rich_help_panel=str(option.panel),
        show_default=False,
        metavar=option.metavar or (None if option.is_flag else _metavar(option)),
        hidden=hidden,
    )
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _help(option: Option, name: str) -> str:
    text = option.help.replace("[", "\\[")  # rich would take [flashinfer] for a style
    if name == _off(option):
        return f"{text} Default: {option.default}; this turns it off."
    return f"{text} Default: {option.default}." if option.default else text


def _off(option: Option) -> str:
    return f"no_{option.name}"


def _metavar(option: Option) -> str:
    kinds = [
        (get_args(kind) or (kind,))[0]  # the type inside an Annotated
        for kind in get_args(option.info.annotation) or (option.info.annotation,)
    ]
    return "N" if int in kinds else "SECONDS" if float in kinds else "TEXT"


_CONTEXT = inspect.Parameter(
    "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
)
_BASE = inspect.Parameter(
    "base",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The base model: short for --model.")
    ],
)
_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options, such as `max-model-len: 2048`.",
            exists=True,
            dir_okay=False,
        ),
    ],
)

# Typer reads the parameters here. The options are declared by their owners.
_PARAMETERS = [_CONTEXT, _BASE, *chain.from_iterable(map(_parameters, server_options())), _CONFIG]
serve.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
serve.__annotations__ = {each.name: each.annotation for each in _PARAMETERS}
