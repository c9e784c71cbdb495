"""Tools in a chat: what a client offers, and what the answer calls."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from .body import Body, JsonObject

__all__ = [
    "FunctionDefinition",
    "NamedFunction",
    "NamedToolChoice",
    "ToolCall",
    "ToolChoice",
    "ToolDefinition",
    "ToolName",
]

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class FunctionDefinition(Body):
    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None  # a JSON schema; None: no arguments
    strict: bool | None = None


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    name: ToolName


class NamedToolChoice(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class CalledFunction(BaseModel):
    name: str
    arguments: str  # JSON, as the model wrote it


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction
