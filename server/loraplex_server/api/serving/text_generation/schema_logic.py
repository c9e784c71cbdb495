"""Rewrites the logic of JSON schemas into types, properties and alternatives.

A grammar has no negation. The values that a schema forbids can often be described by another
schema, though: whatever has no property ``a`` is an object with ``a`` forbidden, or no object.
The rewritten schema never allows more. It allows less where only a part can be described.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

Schema = dict[str, Any]

_TYPES = ("null", "boolean", "number", "string", "array", "object")
OTHER_THAN_ARRAYS = tuple(one for one in _TYPES if one != "array")
_MAX_NODES = 2000  # of the negations of a schema; a reference counts each time, and a character
_MAX_DEPTH = 16  # of schemas within a negated one, references followed
_MAX_DEPENDENCIES = 64
_MAX_CHARACTERS = 400  # of texts that another text must differ from; its pattern has the square
_MAX_SEARCHED = 8  # items of a list, from the first, in which another one is looked for
_MAX_ARRANGEMENTS = 64  # of the items that match, within those
_MAX_DECIMAL = 8  # of the numbers with decimals that stand for all of them
MAX_LISTS = 2000  # of different items, written out
_MAX_WRITTEN = 200_000  # characters of those lists
_NAMES = frozenset({"title", "description", "$comment", "examples", "default", "deprecated"})
_DEFINITIONS = frozenset({"$schema", "$defs", "definitions"})
# Keyword → keywords beside which it means something else.
_CHANGED_BY = {"contains": {"minContains", "maxContains"}, "items": {"prefixItems"}}


class NotExpressible(ValueError):
    """The schema has no equal without the keyword, or only a huge one."""


class Negation:
    """Describes what the parts of one schema forbid."""

    def __init__(self, follow: Callable[[object], object]) -> None:
        """``follow`` returns the target of a reference."""
        self._follow = follow
        self._n_left = _MAX_NODES

    def of(self, schema: object, depth: int = 0) -> list[Schema]:
        """Return alternatives that together allow what ``schema`` forbids, or a part of that.

        Raises NotExpressible if no part can be described.
        """
        schema = self._follow(schema)
        self._spend(1)
        if schema is True:
            return []
        if schema is False:
            return [{}]
        if not isinstance(schema, dict) or "$ref" in schema or depth > _MAX_DEPTH:
            raise NotExpressible
        alternatives: list[Schema] = []
        is_partial = False
        for key, value in schema.items():
            if key not in _NAMES | _DEFINITIONS and not schema.keys() & _CHANGED_BY.get(key, set()):
                try:
                    alternatives += self._of_keyword(key, value, depth + 1)
                except NotExpressible:
                    is_partial = True  # the alternatives of other keywords are forbidden, too
        if is_partial and not alternatives:
            raise NotExpressible
        return alternatives

    def _of_keyword(self, key: str, value: Any, depth: int) -> list[Schema]:
        match key:
            case "anyOf":
                return _all_of([self.of(item, depth) for item in value])
            case "allOf":
                return list(itertools.chain(*(self.of(item, depth) for item in value)))
            case "oneOf":
                pairs = [pair for pair in itertools.combinations(value, 2) if not self.apart(*pair)]
                self._spend(sum(_n_nodes(pair) for pair in pairs))
                none = _all_of([self.of(item, depth) for item in value])
                return [*none, *({"allOf": list(pair)} for pair in pairs)]
            case "not":
                self._spend(_n_nodes(value))
                return [{"allOf": [value]}]
            case "properties":
                return [
                    {"type": "object", "required": [name], "properties": {name: one}}
                    for name, of_name in value.items()
                    for one in self.of(of_name, depth)
                ]
            case "contains":
                return [{"type": "array", "items": {"anyOf": self.of(value, depth)}}]
            case "items" if not isinstance(value, list):
                return containing({"anyOf": self.of(value, depth)}, 1, None, {})
            case _ if key in _NEGATIONS:
                self._spend(_n_nodes(value))
                return _NEGATIONS[key](value)
        raise NotExpressible

    def one_of(self, schemas: Sequence[object]) -> list[object]:
        """Return alternatives that allow a value which exactly one of ``schemas`` allows.

        Raises NotExpressible.
        """
        alternatives: list[object] = []
        for schema in schemas:
            others = [
                self.of(other)
                for other in schemas
                if other is not schema and not self.apart(schema, other)
            ]
            if not others:
                alternatives.append(schema)
            elif all(others):
                alternatives.append({"allOf": [schema, *({"anyOf": one} for one in others)]})
        if not alternatives:
            raise NotExpressible
        return alternatives

    def apart(self, one: object, other: object) -> bool:
        """Return True if it is plain that no value matches both schemas."""
        one, other = self._follow(one), self._follow(other)
        if not isinstance(one, dict) or not isinstance(other, dict):
            return one is False or other is False
        values, others = _listed(one), _listed(other)
        if values is not None and others is not None:
            return not values & others
        if "type" in one and "type" in other:
            kinds, other_kinds = _kinds(one["type"]), _kinds(other["type"])
            if not kinds & other_kinds:
                return True
        if one.get("type") != "object" or other.get("type") != "object":
            return False
        properties, other_properties = one.get("properties", {}), other.get("properties", {})
        required, others_required = set(one.get("required", ())), set(other.get("required", ()))
        return any(
            self.apart(properties[name], other_properties[name])
            for name in required & others_required & properties.keys() & other_properties.keys()
        ) or bool(_forbidden(other, required) or _forbidden(one, others_required))

    def _spend(self, n_nodes: int) -> None:
        self._n_left -= n_nodes
        if self._n_left < 0:
            raise NotExpressible


def dependencies(needs: dict[str, object]) -> list[Schema]:
    """Return the schemas that a value must match, one for each property that needs others.

    A property needs a list of properties, or a schema for the whole object. Raises NotExpressible
    if there are too many.
    """
    if len(needs) > _MAX_DEPENDENCIES:
        raise NotExpressible
    return [
        {
            "anyOf": [
                {"properties": {name: False}},
                {"required": need} if isinstance(need, list) else need,
            ]
        }
        for name, need in needs.items()
        if need not in ([], {}, True)
    ]


def containing(
    schema: object, at_least: int, at_most: int | None, others: object, n_items: float = math.inf
) -> list[Schema]:
    """Return lists in whose first items ``schema`` is matched as often as asked.

    ``others``: what the rest of the items match. ``n_items``: the most items of a list. Raises
    NotExpressible for too many lists.
    """
    n_searched = int(min(n_items, _MAX_SEARCHED))
    highest = at_least if at_most is None else min(at_most, n_searched)
    counts = range(at_least, highest + 1)
    n_lists = sum(math.comb(n_searched, n) for n in counts)
    if not 0 < n_lists <= _MAX_ARRANGEMENTS:
        raise NotExpressible
    arrangements = [
        places for n in counts for places in itertools.combinations(range(n_searched), n)
    ]
    return [
        {
            "type": "array",
            "prefixItems": [
                schema if at in places else others for at in range(max(places, default=-1) + 1)
            ],
            "items": others,
            "minItems": max(places, default=-1) + 1,
        }
        for places in arrangements
    ]


def different_items(schema: Schema, items: object, n_most: int) -> Schema:
    """Return ``schema`` with all lists of different items as its values, the shortest first.

    ``items`` is the schema of an item, which must have few values. Raises NotExpressible for more
    than ``n_most`` lists.
    """
    if not isinstance(items, dict) or schema.get("type") != "array" or "prefixItems" in schema:
        raise NotExpressible
    values = _values(items)
    if len(values) > n_most:
        raise NotExpressible
    lengths = range(
        schema.get("minItems", 0), min(len(values), schema.get("maxItems", len(values))) + 1
    )
    n_lists = 0
    for length in lengths:
        n_lists += math.perm(len(values), length)
        if n_lists > n_most or n_lists * len(json.dumps(values)) > _MAX_WRITTEN:
            raise NotExpressible
    if not n_lists:
        raise NotExpressible
    rest = {
        key: value
        for key, value in schema.items()
        if key not in ("type", "items", "uniqueItems", "minItems", "maxItems")
    }
    lists = [list(one) for length in lengths for one in itertools.permutations(values, length)]
    return {**rest, "enum": lists}


def _values(items: Schema) -> list[object]:
    """Return the values of a schema that lists them. Raises NotExpressible."""
    constraints = items.keys() - _NAMES
    if constraints == {"type"} and items["type"] in ("boolean", "null"):
        return [False, True] if items["type"] == "boolean" else [None]
    listed = items.get("enum", [items["const"]] if "const" in items else None)
    if not isinstance(listed, list) or not constraints <= {"enum", "const", "type"}:
        raise NotExpressible
    if len(constraints - {"type"}) != 1:
        raise NotExpressible
    of_type = [value for value in listed if _is_of(value, items.get("type"))]
    if any(isinstance(value, list | dict) for value in of_type):
        raise NotExpressible
    return list({(_type_of(value), value): value for value in of_type}.values())  # 1.0 is 1


def _listed(schema: Schema) -> set[str] | None:
    """Return the JSON texts of the only values that a schema may allow, or None for others."""
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return {json.dumps(_plain(one), sort_keys=True) for one in listed} if listed else None


def _plain(value: object) -> object:
    """Return 1 for 1.0, which is equal in JSON Schema, also within a list or an object."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _kinds(types: str | list[str]) -> set[str]:
    named = {types} if isinstance(types, str) else set(types)
    return named | {"integer"} if "number" in named else named


def _forbidden(schema: Schema, names: set[str]) -> set[str]:
    """Return those of the properties that an object of ``schema`` cannot have."""
    properties = schema.get("properties", {})
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        return {name for name in names if properties.get(name, False) is False}
    return {name for name in names if properties.get(name) is False}


def _n_nodes(value: object) -> int:
    if isinstance(value, str):
        return 1 + len(value)
    if isinstance(value, dict):
        return 1 + sum(map(_n_nodes, value.values()))
    return 1 + sum(map(_n_nodes, value)) if isinstance(value, list) else 1


def _is_of(value: object, types: object) -> bool:
    if types is None:
        return True
    allowed = types if isinstance(types, list) else [types]
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kind = _type_of(value)
    return kind in allowed or (kind == "number" and is_whole and "integer" in allowed)


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _all_of(parts: Sequence[list[Schema]]) -> list[Schema]:
    """Return the alternatives of a value that matches one alternative of each part."""
    return [{"allOf": [{"anyOf": part} if part else False for part in parts]}] if all(parts) else []


def _not_type(types: object) -> list[Schema]:
    named = set(types if isinstance(types, list) else [types])
    rest = [one for one in _TYPES if one not in named]
    if "integer" not in named or "number" in named:
        return [{"type": rest}] if rest else []
    rest.remove("number")
    others: list[Schema] = [{"type": rest}] if rest else []
    return others + [  # numbers with decimals have no schema of their own
        {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + 1}
        for low in range(-_MAX_DECIMAL, _MAX_DECIMAL)
    ]


def _not_required(names: list[str]) -> list[Schema]:
    return [{"type": "object", "properties": {name: False}} for name in names]


def _not_values(values: Sequence[object]) -> list[Schema]:
    """Return schemas of everything but these; of a list or an object, of values of other types."""
    by_type: dict[str, list[Any]] = {}
    for value in values:
        by_type.setdefault(_type_of(value), []).append(value)
    alternatives: list[Schema] = [{"type": [one for one in _TYPES if one not in by_type]}]
    if "string" in by_type:
        pattern = f"^({'|'.join(_other_strings(set(by_type['string'])))})$"
        alternatives.append({"type": "string", "pattern": pattern})
    if len(flags := set(by_type.get("boolean", ()))) == 1:
        alternatives.append({"const": not flags.pop()})
    if numbers := sorted(set(by_type.get("number", ()))):
        alternatives.append({"type": "number", "exclusiveMaximum": numbers[0]})
        alternatives.append({"type": "number", "exclusiveMinimum": numbers[-1]})
        alternatives += [
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
            for low, high in itertools.pairwise(numbers)
        ]
    return alternatives


def _other_strings(texts: set[str]) -> list[str]:
    """Return expressions that together match every text but these, by their first difference."""
    if sum(map(len, texts)) > _MAX_CHARACTERS:
        raise NotExpressible
    nexts: dict[str, set[str]] = {text: set() for text in texts}
    for text in texts:
        for n, character in enumerate(text):
            nexts.setdefault(text[:n], set()).add(character)
    found: list[str] = []
    for start, characters in sorted(nexts.items()):
        if start not in texts:
            found.append(re.escape(start))
        other = f"[^{''.join(map(_in_class, sorted(characters)))}]" if characters else r"(.|\n)"
        found.append(rf"{re.escape(start)}{other}(.|\n)*")
    return found


def _in_class(character: str) -> str:
    return f"\\{character}" if character in r"\]^-[&~" else character


# Keyword → the alternatives of a value that breaks it. Each of them says its type, since a keyword
# holds for values of other types.
_NEGATIONS: dict[str, Callable[[Any], list[Schema]]] = {
    "type": _not_type,
    "required": _not_required,
    "enum": _not_values,
    "const": lambda value: _not_values([value]),
    "minimum": lambda bound: [{"type": "number", "exclusiveMaximum": bound}],
    "maximum": lambda bound: [{"type": "number", "exclusiveMinimum": bound}],
    "exclusiveMinimum": lambda bound: [{"type": "number", "maximum": bound}],
    "exclusiveMaximum": lambda bound: [{"type": "number", "minimum": bound}],
    "minLength": lambda n: [{"type": "string", "maxLength": n - 1}] if n > 0 else [],
    "maxLength": lambda n: [{"type": "string", "minLength": n + 1}],
    "minItems": lambda n: [{"type": "array", "maxItems": n - 1}] if n > 0 else [],
    "maxItems": lambda n: [{"type": "array", "minItems": n + 1}],
}
