"""The tools that a client offers, and the calls in an answer."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from .body import Body, Few, JsonObject

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class FunctionDefinition(Body):
    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None  # a JSON schema; None: no arguments
    strict: bool | None = None


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[Few[ToolDefinition], Field(max_length=128)]


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
