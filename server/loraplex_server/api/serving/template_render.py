"""Renders a chat template as transformers does; runs in a worker process, imports only jinja2.

Why not transformers' own function: a process that imports transformers starts in seconds and takes
a few hundred megabytes; this one starts in a tenth of a second. A test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["render"]

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, object],
    continue_final_message: bool,
) -> str:
    """``messages`` and ``options`` are plain JSON; ``options`` is what the template sees beside
    the messages: ``add_generation_prompt``, ``tools``, special tokens.

    Raises ValueError, TemplateError, or whatever a template comes to.
    """
    shown = [_message(message) for message in messages]
    seen = {"tools": None, "documents": None, **options, "messages": shown}
    if not continue_final_message:
        return _compiled(template).render(seen)
    if options.get("add_generation_prompt"):
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    last = shown[-1].get("content")
    if not isinstance(last, str):
        raise ValueError("continue_final_message needs a last message with content to continue")
    shown[-1]["content"] = last + _MARK
    return _cut_at_mark(_compiled(template).render(seen), last)


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without fields that are null; reasoning under the names that templates read."""
    message = {name: value for name, value in given.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _cut_at_mark(text: str, last: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or last.strip() not in text:
        raise ValueError("continue_final_message: the template does not show the last message")
    kept = text[:at]
    return kept if text.startswith(_MARK, at) else kept.rstrip()  # else the template trims


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(Extension):
    """``{% generation %}`` marks what the model said, for training; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        show = self.call_method("_show")
        return nodes.CallBlock(show, [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """``dict`` without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Keeps no names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set ``self``
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace keeps no name with an underscore in front: {name!r}")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
