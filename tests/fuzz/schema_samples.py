"""Bodies that /openapi.json allows, more or less: where a fuzzed request begins."""

import random
from collections.abc import Mapping
from typing import Any

from .values import NUMBERS, STRINGS, odd_value

_P_OPTIONAL = 0.25


def sample(rng: random.Random, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """``root``: the whole document, for references."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return sample(rng, target, root)
    for union in ("anyOf", "oneOf"):
        if union in schema and "properties" not in schema:
            return sample(rng, rng.choice(schema[union]), root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match schema.get("type"):
        case "object":
            return _object(rng, schema, root)
        case "array":
            n = max(schema.get("minItems", 0), rng.randrange(3))
            return [sample(rng, schema.get("items", {}), root) for _ in range(n)]
        case "string":
            return rng.choice(STRINGS[:9])
        case "integer":
            return min(max(rng.randrange(6), schema.get("minimum", 0)), schema.get("maximum", 9))
        case "number":
            return rng.choice((0, 0.5, 1, 1.0))
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
    return odd_value(rng) if rng.random() < 0.5 else rng.choice((*STRINGS[:9], *NUMBERS[:6]))


def _object(rng: random.Random, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    needed = set(schema.get("required", ()))
    if "oneOf" in schema:
        needed |= set(rng.choice(schema["oneOf"]).get("required", ()))
    made = {
        name: sample(rng, inner, root)
        for name, inner in schema.get("properties", {}).items()
        if name in needed or rng.random() < _P_OPTIONAL
    }
    if "max_tokens" in schema.get("properties", {}) and rng.random() < 0.9:
        made["max_tokens"] = rng.randrange(1, 5)  # answers end soon
    return made
