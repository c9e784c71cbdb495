"""The base of all request bodies, and types that they share."""

import reprlib
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, SkipValidation

INT64_END = 1 << 63
Item = TypeVar("Item")

# Bodies come from a JSON parser. Pydantic would check each value in Python again.
_Parsed = Annotated[JsonValue, SkipValidation()]
JsonObject = dict[str, _Parsed]
JsonList = list[_Parsed]
# Validation stops at the first wrong item, not after a million of them.
Few = Annotated[list[Item], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]  # the vocabulary is smaller; see check_ids


class Body(BaseModel):
    """A request body. Types are strict: "0.7" is not a number.

    Unknown fields go to ``model_extra``.
    """

    model_config = ConfigDict(strict=True, extra="allow")


def exactly_one_of(**kinds: JsonValue) -> ConfigDict:
    """State in the schema that exactly one of the fields is set. The route checks the body.

    ``kinds``: field → its JSON types.
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
    """Refuses a mapping with too many entries before it validates any of them."""

    def __init__(self, max_entries: int) -> None:
        def check(value: object) -> object:
            if isinstance(value, dict) and len(value) > max_entries:
                raise ValueError(f"at most {max_entries} entries are accepted, not {len(value)}")
            return value

        super().__init__(check)


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    LimitedDict(16),
]


class _Shown(reprlib.Repr):
    """Shortens values, which may be megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = 60
        self.maxlist = self.maxdict = 4
        self.maxlevel = 2

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802  reprlib calls it so
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_float(self, value: float, level: int) -> str:
        return repr(value)

    def repr_instance(self, value: object, level: int) -> str:
        return "a file"  # JSON has no other values; forms have files


shown = _Shown().repr
