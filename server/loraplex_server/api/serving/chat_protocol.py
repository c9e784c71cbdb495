"""How a model writes what is not plain text: tool calls and reasoning.

From the chat template, which says it by its examples, unless the adapter's card says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from pydantic import JsonValue

from loraplex_server.adapters.adapter_defaults import ReasoningMarkers
from loraplex_server.api.errors import invalid

__all__ = ["CallForm", "ChatProtocol", "Markers", "chat_protocol"]


class Markers(NamedTuple):
    open: str
    close: str


class CallForm(NamedTuple):
    """``is_array``: one region with a list of calls, else a region for each call.

    Without ``close`` the region goes on to the end of the answer.
    """

    open: str
    close: str
    is_array: bool
    gap: str = ""  # white space inside the markers
    arguments: str = "arguments"  # the key of a call's arguments
    several: bool = True  # an answer may have more than one call


_ARRAY = CallForm("<tool_call>", "</tool_call>", is_array=True)  # SmolLM2
_SINGLE = CallForm("<tool_call>", "</tool_call>", is_array=False, gap="\n")  # Hermes, Qwen
_THINK = Markers("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class ChatProtocol:
    template: str | None  # None: the base's own
    calls: CallForm
    reasoning: Markers | None
    response_template: Mapping[str, JsonValue] | None = None  # transformers' format; replaces both


def chat_protocol(
    own_template: str | None,
    base_template: object,
    *,
    with_tools: bool,
    reasoning: ReasoningMarkers | Literal[False] | None = None,
    response_template: Mapping[str, JsonValue] | None = None,
) -> ChatProtocol:
    """``own_template``: the adapter's. ``with_tools``: the chat has tools or calls in it.
    ``reasoning``: the card's; None: as the template says.

    Raises ApiError (400) where no template knows how to show tools.
    """
    template = own_template
    text = own_template or _text(base_template)
    if with_tools and "tool" not in text:
        if own_template is not None:
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
    return ChatProtocol(template, _ARRAY if is_array else _SINGLE, markers, response_template)


def _text(template: object) -> str:
    """A base may have several templates by name."""
    if isinstance(template, dict):
        return str(template.get("tool_use") or template.get("default") or "")
    return template if isinstance(template, str) else ""


@cache
def _chatml_tools() -> str:
    return (files(__package__) / "chatml_tools.jinja").read_text("utf-8")
