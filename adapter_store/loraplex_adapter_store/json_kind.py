"""The kind of a JSON value, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["json_kind"]


def json_kind(value: object) -> str:
    """As "a list". Whoever sent JSON need not know what Python makes of it."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case Mapping():
            return "an object"
        case Sequence():
            return "a list"
    return "no JSON"
