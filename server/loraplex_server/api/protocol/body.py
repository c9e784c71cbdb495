"""What all request bodies have in common, and lists that stop at their first mistake."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

__all__ = ["INT64", "Body", "Few", "JsonList", "JsonObject", "LimitedDict", "Name"]

INT64 = (1 << 63) - 1
Item = TypeVar("Item")

JsonObject = dict[str, JsonValue]
JsonList = list[JsonValue]
# Pydantic would collect a problem for each of a million wrong items.
Few = Annotated[list[Item], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=512)]


class Body(BaseModel):
    """Types are strict ("0.7" is no number); unknown fields are kept aside, see ``extra``."""

    model_config = ConfigDict(strict=True, extra="allow")


class LimitedDict(BeforeValidator):
    """Refuses a mapping with more entries before any of them is looked at."""

    def __init__(self, max_entries: int) -> None:
        def check(value: object) -> object:
            if isinstance(value, dict) and len(value) > max_entries:
                raise ValueError(f"at most {max_entries} entries are accepted, not {len(value)}")
            return value

        super().__init__(check)
