"""What an answer has to look like: OpenAI's response_format, vLLM's structured_outputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .body import Body, Few, JsonObject

__all__ = ["Choices", "JsonSchema", "NamedSchema", "ResponseFormat", "StructuredOutputs"]

JsonSchema = JsonObject | bool
Choices = Annotated[Few[str], Field(min_length=1, max_length=10_000)]


class NamedSchema(Body):
    """``schema`` is the JSON schema; without one any JSON value is allowed."""

    name: Annotated[str, Field(max_length=512)] | None = None
    description: str | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None  # with the type of that name


class StructuredOutputs(Body):
    """Exactly one of the fields."""

    json_: Annotated[JsonSchema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
