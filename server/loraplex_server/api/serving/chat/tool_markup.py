"""The markup with which a model writes tool calls and reasoning.

The markup is found in the examples of the chat template, or stated by the adapter's card.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from pydantic import JsonValue

from loraplex_server.adapters.resolving.adapter_defaults import ReasoningMarkers
from loraplex_server.errors import invalid


class Markers(NamedTuple):
    """The texts around a region of an answer."""

    open: str
    close: str


class CallMarkup(NamedTuple):
    """The markup of tool calls."""

    open: str
    close: str
    is_array: bool  # one region with a list of calls, else a region for each call
    gap: str = ""  # white space inside the markers


_ARRAY = CallMarkup("<tool_call>", "</tool_call>", is_array=True)  # SmolLM2
_SINGLE = CallMarkup("<tool_call>", "</tool_call>", is_array=False, gap="\n")  # Hermes, Qwen
_THINK = Markers("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class ChatMarkup:
    """The chat template, and the markup of its answers."""

    template: str | None  # None: the base's own
    calls: CallMarkup
    reasoning: Markers | None
    response_template: Mapping[str, JsonValue] | None = None  # of transformers; replaces both


def chat_markup(
    adapter_template: str | None,
    base_template: object,
    *,
    with_tools: bool,
    reasoning: ReasoningMarkers | Literal[False] | None = None,
    response_template: Mapping[str, JsonValue] | None = None,
) -> ChatMarkup:
    """Return the markup of a chat. ``reasoning`` are the markers of the adapter's card, if any.

    Raises ApiError (400) if no template can show tools.
    """
    template = adapter_template
    text = adapter_template or _text(base_template)
    if with_tools and "tool" not in text:
        if adapter_template is not None:
            raise invalid(
                "this adapter's chat template does not show tools; give its card one that does",
                "tools",
                "tools_not_supported",
            )
        if "<|im_start|>" not in text:
            raise invalid(
                "this base model's chat template does not show tools; use an adapter whose card "
                "has a chat_template that does",
                "tools",
                "tools_not_supported",
            )
        template = text = _chatml_tools()
    markers = _THINK if _THINK.open in text or _THINK.close in text else None
    if reasoning is not None:
        markers = Markers(reasoning.open, reasoning.close) if reasoning else None
    is_array = "<tool_call>[" in text or "<tool_call>" not in text
    return ChatMarkup(template, _ARRAY if is_array else _SINGLE, markers, response_template)


def _text(template: object) -> str:
    """Return the template as text. A base may have several templates by name."""
    if isinstance(template, dict):
        return str(template.get("tool_use") or template.get("default") or "")
    return template if isinstance(template, str) else ""


@cache
def _chatml_tools() -> str:
    return (files(__package__) / "chatml_tools.jinja").read_text("utf-8")
