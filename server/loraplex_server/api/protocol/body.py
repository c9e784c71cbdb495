"""What all request bodies have in common, and lists that stop at their first mistake."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, SkipValidation

__all__ = [
    "INT64_END",
    "Body",
    "Few",
    "JsonList",
    "JsonObject",
    "LimitedDict",
    "Name",
    "TokenId",
    "exactly_one_of",
]

INT64_END = 1 << 63
Item = TypeVar("Item")

# Bodies come from a JSON parser: pydantic would call Python for each value to say that it is JSON.
_Parsed = Annotated[JsonValue, SkipValidation()]
JsonObject = dict[str, _Parsed]
JsonList = list[_Parsed]
# Pydantic would collect a problem for each of a million wrong items.
Few = Annotated[list[Item], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]  # the vocabulary is smaller; see check_ids


class Body(BaseModel):
    """Types are strict ("0.7" is no number); unknown fields are kept aside, see ``extra``."""

    model_config = ConfigDict(strict=True, extra="allow")


def exactly_one_of(**kinds: JsonValue) -> ConfigDict:
    """Says in the schema that one of the fields is given and the others are left out or null.

    ``kinds``: field → its JSON types. The route checks it.
    """
    return ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {name: {"type": kind}}, "required": [name]}
                for name, kind in kinds.items()
            ]
        }
    )


class LimitedDict(BeforeValidator):
    """Refuses a mapping with more entries before any of them is looked at."""

    def __init__(self, max_entries: int) -> None:
        def check(value: object) -> object:
            if isinstance(value, dict) and len(value) > max_entries:
                raise ValueError(f"at most {max_entries} entries are accepted, not {len(value)}")
            return value

        super().__init__(check)
