"""Rewrites JSON schemas into ones that llguidance enforces, and that allow no further value.

Keywords without effect are left out, since llguidance refuses them. Its numbers are computed in
float64 and int64, so bounds outside become bounds inside, and exclusive bounds inclusive ones.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction

from .schema_logic import (
    MAX_LISTS,
    OTHER_THAN_ARRAYS,
    Negation,
    NotExpressible,
    Schema,
    containing,
    dependencies,
    different_items,
)

_EXACT = 1 << 53  # integers up to here are exact in float64
_INT64 = (1 << 63) - 1
_DIGITS = 15  # decimal digits that float64 keeps
# Formats that llguidance lacks → schemas that allow no other text than these formats do.
_REFERENCE = {
    "anyOf": [{"format": "uri"}, {"pattern": r"^[A-Za-z0-9._~/-]*([#?][A-Za-z0-9._~/-]*)?$"}]
}
_NO_LEAP_SECOND = "^[^:]*:[^:]*:[0-5]"  # llguidance allows second 60 in every minute
_NARROWER: Mapping[str, Schema] = {
    "time": {"format": "time", "pattern": _NO_LEAP_SECOND},
    "date-time": {"format": "date-time", "pattern": _NO_LEAP_SECOND},
    "uri-reference": _REFERENCE,
    "iri-reference": _REFERENCE,
    "iri": {"format": "uri"},
    "idn-email": {"format": "email"},
    "idn-hostname": {"format": "hostname"},
    "uri-template": {"pattern": "^[A-Za-z0-9._~/?#-]*$"},
    "json-pointer": {"pattern": "^(/([^~/]|~[01])*)*$"},
    "relative-json-pointer": {"pattern": "^(0|[1-9][0-9]*)(#|(/([^~/]|~[01])*)*)$"},
}
# JSON Schema defines these. All others are annotations.
_DEFINED = frozenset(
    {
        *("date", "duration", "email", "hostname", "ipv4", "ipv6", "uri"),
        *("uuid", *_NARROWER),
    }
)
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_NOT_REGULAR = re.compile(r"\(\?<?[=!]|\\[1-9]")  # look-around and back-references
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SINGLE = (
    *("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else"),
    *("propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
_IN_PLACE = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas"})
_ANYTHING: tuple[object, ...] = (True, {})
_MAX_DEPTH = 30  # of schemas whose logic is rewritten, which makes them deeper
_MAX_SCHEMAS = 2000  # in one, after rewriting: some 30 ms of the event loop
_MALFORMED = (TypeError, AttributeError)  # of a keyword with an odd value, which llguidance names


def enforceable(schema: object, *, lenient: bool = False) -> object:
    """Return a schema that allows no value that ``schema`` forbids, and whose numbers are exact.

    ``lenient`` leaves out bounds and patterns that cannot be enforced. Otherwise, and for a
    constant or too many schemas, raises ValueError.
    """
    if schema is True:
        return {}
    return _Rewriting(schema, lenient).of(schema)


class _Rewriting:
    def __init__(self, root: object, lenient: bool) -> None:
        self._root, self._lenient = root, lenient
        self._negation = Negation(self._followed)
        self._depth = self._n_schemas = 0
        self._n_lists_left = MAX_LISTS
        # Keyword → what an equal schema says in its place. They raise NotExpressible.
        self._logic: Mapping[str, Callable[[Schema], Sequence[object]]] = {
            "not": lambda schema: (
                [] if schema["not"] is False else [self._forbidding(schema["not"])]
            ),
            "if": self._condition,
            "oneOf": lambda schema: [{"anyOf": self._negation.one_of(schema["oneOf"])}],
            "contains": self._containing,
            "dependencies": lambda schema: dependencies(schema["dependencies"]),
            "dependentRequired": lambda schema: dependencies(schema["dependentRequired"]),
            "dependentSchemas": lambda schema: dependencies(schema["dependentSchemas"]),
        }

    def of(self, schema: object) -> object:
        if not isinstance(schema, dict):
            return schema
        if schema.get("not", False) in _ANYTHING:
            return False
        self._n_schemas += 1
        if self._n_schemas > _MAX_SCHEMAS:
            raise ValueError(f"it has more than {_MAX_SCHEMAS:,} schemas within it")
        self._depth += 1
        try:
            return self._of(self._without_logic(schema) if self._depth < _MAX_DEPTH else schema)
        finally:
            self._depth -= 1

    def _of(self, schema: Schema) -> Schema:
        rewritten = dict(schema)
        for name in _LISTS:
            if isinstance(schema.get(name), list):
                rewritten[name] = [self.of(item) for item in schema[name]]
        if isinstance(schema.get("items"), list):  # of draft 7
            rewritten["items"] = [self.of(item) for item in schema["items"]]
        for name in _MAPPINGS:
            if isinstance(schema.get(name), dict):
                rewritten[name] = {key: self.of(item) for key, item in schema[name].items()}
        for name in _SINGLE:
            if isinstance(schema.get(name), dict):
                rewritten[name] = self.of(schema[name])
        for name, has_none in _WITHOUT_EFFECT.items():
            if name in rewritten and has_none(rewritten):
                del rewritten[name]
        self._name_properties(rewritten)
        _close(rewritten)
        if self._lenient and _NOT_REGULAR.search(str(rewritten.get("pattern", ""))):
            del rewritten["pattern"]
        try:
            _bound_numbers(rewritten)
        except ValueError:
            if not self._lenient:
                raise
            for name in _BOUNDS:
                rewritten.pop(name, None)
        for value in (rewritten.get("const"), *_list(rewritten.get("enum"))):
            _check_exact(value)
        return rewritten

    def _without_logic(self, schema: Schema) -> Schema:
        """Replace negations, conditions, dependencies and different items where that is exact."""
        schema, conditions = dict(schema), list[object]()
        for name, conditions_of in self._logic.items():
            if name in schema:
                with suppress(NotExpressible, *_MALFORMED):
                    conditions += conditions_of(schema)
                    del schema[name]
        if "if" not in schema:
            schema.pop("then", None)
            schema.pop("else", None)
        if schema.get("uniqueItems") is True:
            with suppress(NotExpressible, *_MALFORMED):
                items = self._followed(schema.get("items"))
                schema = different_items(schema, items, self._n_lists_left)
                self._n_lists_left -= len(schema["enum"])
        if isinstance(schema.get("format"), str) and schema["format"] in _NARROWER:
            conditions.append(_NARROWER[schema.pop("format")])
        if conditions:
            schema["allOf"] = [*_list(schema.get("allOf")), *conditions]
        return schema

    def _forbidding(self, schema: object) -> Schema:
        alternatives = self._negation.of(schema)
        if not alternatives:  # no value is allowed
            raise NotExpressible
        return {"anyOf": alternatives}

    def _condition(self, schema: Schema) -> list[object]:
        then, otherwise = schema.get("then", True), schema.get("else", True)
        if then in _ANYTHING and otherwise in _ANYTHING:
            return []
        return [
            {
                "anyOf": [
                    {"allOf": [schema["if"], then]},
                    {"allOf": [self._forbidding(schema["if"]), otherwise]},
                ]
            }
        ]

    def _containing(self, schema: Schema) -> list[object]:
        at_least, at_most = schema.get("minContains", 1), schema.get("maxContains")
        if at_least == 0 and at_most is None:
            return []
        others = {} if at_most is None else self._forbidding(schema["contains"])
        n_items = _number(schema.get("maxItems"), math.inf)
        lists = containing(schema["contains"], at_least, at_most, others, n_items)
        return [{"anyOf": [{"type": list(OTHER_THAN_ARRAYS)}, *lists]}]

    def _name_properties(self, schema: Schema) -> None:
        """Replace ``propertyNames`` by the names themselves, or by their pattern."""
        names = self._followed(schema.get("propertyNames"))
        if not isinstance(names, dict) or "patternProperties" in schema:
            return
        properties = schema.get("properties", {})
        value = schema.get("additionalProperties", {})
        constraints = names.keys() - {"type", "title", "description"}
        if constraints <= {"enum", "const"} and constraints:
            allowed = names.get("enum", [names.get("const")])
            schema["properties"] = {
                name: properties.get(name, value) for name in allowed if isinstance(name, str)
            }
        elif constraints == {"pattern"} and not properties:
            schema["patternProperties"] = {names["pattern"]: value}
        else:
            return
        del schema["propertyNames"]
        schema["additionalProperties"] = False

    def _followed(self, schema: object) -> object:
        """Return the schema that a reference within the document names."""
        if not isinstance(schema, dict) or schema.keys() != {"$ref"}:
            return schema
        target: object = self._root
        for key in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        return target


def _close(schema: Schema) -> None:
    """Replace ``unevaluatedProperties: false`` where it is ``additionalProperties: false``."""
    if schema.get("unevaluatedProperties") is False and not schema.keys() & _IN_PLACE:
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)


def _check_exact(value: object) -> None:
    """Raises ValueError for a number that llguidance would change."""
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _check_exact(item)
    elif isinstance(value, int | float) and value != _INT64:
        if abs(value) < _INT64 and int(float(value)) == int(value):
            return
        raise ValueError(f"{value} is not exact in float64 or beyond int64; write it as a string")


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _without(*names: str) -> Callable[[Schema], bool]:
    return lambda schema: not schema.keys() & {*names}


# Keyword → is it without effect in this schema?
_WITHOUT_EFFECT: Mapping[str, Callable[[Schema], bool]] = {
    "uniqueItems": lambda schema: (
        schema["uniqueItems"] is False or _number(schema.get("maxItems"), 2) <= 1
    ),
    "minContains": _without("contains"),
    "maxContains": _without("contains"),
    "propertyNames": lambda schema: schema["propertyNames"] in (*_ANYTHING, {"type": "string"}),
    "unevaluatedProperties": lambda schema: schema["unevaluatedProperties"] in _ANYTHING,
    "unevaluatedItems": lambda schema: schema["unevaluatedItems"] in _ANYTHING,
    "format": lambda schema: schema["format"] not in _DEFINED,
}


def _number(value: object, default: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _bound_numbers(schema: Schema) -> None:
    """Make the bounds of numbers exact. Raises ValueError for a bound that cannot be."""
    kinds = schema.get("type", "number")
    whole = "integer" in kinds and "number" not in kinds
    for name, exclusive, sign in (
        ("minimum", "exclusiveMinimum", 1),
        ("maximum", "exclusiveMaximum", -1),
    ):
        bounds = []
        for key in (name, exclusive):
            bound = _number(schema.get(key), math.nan)
            if math.isfinite(bound) and (key == name or whole or bound % 1 == 0):
                del schema[key]
                bounds.append(_least(sign * Fraction(bound), key, whole=whole))
        if bounds:
            schema[name] = _plain(sign * max(bounds))


def _least(bound: Fraction, key: str, *, whole: bool) -> Fraction:
    """Return the least value that a lower bound allows. An upper bound comes with its sign changed.

    llguidance takes 0 for a number above 0 and below 0.5, so the next decimal number that float64
    can tell apart stands in for an exclusive bound.
    """
    if key.startswith("exclusive"):
        if whole:
            bound = Fraction(math.floor(bound) + 1)
        else:
            bound += Fraction(10) ** max(len(str(abs(int(bound)))) - _DIGITS, -9)
    elif whole:
        bound = Fraction(math.ceil(bound))
    if bound > _EXACT:
        raise ValueError(f"{key} is beyond ±2^53, where numbers cannot be told apart exactly")
    if bound < -_EXACT:
        whole_range = whole and key.endswith("aximum") and bound <= -_INT64
        return Fraction(-_INT64 if whole_range else -_EXACT)
    return bound


def _plain(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
