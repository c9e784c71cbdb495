"""Every route with its parameters, bodies and answers, from ``/openapi.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .tables import cell, table

__all__ = ["http_api_page"]

_HEAD = """# Every route

Made of `/openapi.json`, which a server also shows at `/docs`, to be tried. What the routes are for,
how a request names an adapter and what errors mean: [HTTP API](../http-api.md).
"""
Schema = Mapping[str, Any]


def http_api_page(openapi: Schema) -> str:
    lines = [_HEAD]
    for path, methods in sorted(openapi["paths"].items()):
        for method, operation in methods.items():
            lines += _route(method.upper(), path, operation)
    lines += ["## Objects", "", "What bodies and answers are made of.", ""]
    for name, schema in sorted(openapi["components"]["schemas"].items()):
        lines += [f"### {name}", "", *_described(schema)]
        fields = table(("field", "type", ""), _fields(schema))
        lines += fields or [f"{_type(schema)}", ""]
    return "\n".join(lines)


def _route(method: str, path: str, operation: Schema) -> Iterator[str]:
    yield from (f"## {method} {path}", "", *_described(operation))
    rows = [
        (
            f"`{each['name']}`",
            each["in"] + ("" if each.get("required") else ", optional"),
            _type(each["schema"]),
            _limits(each["schema"]),
        )
        for each in operation.get("parameters", ())
    ]
    yield from table(("parameter", "in", "type", ""), rows)
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        yield from (f"Body, `{media_type}`: {_type(schema)}", "")
        yield from table(("field", "type", ""), _fields(schema))
    answers = sorted(operation["responses"].items())
    rows = [
        (status, _answer(answer), cell(answer["description"]).replace("Successful Response", ""))
        for status, answer in answers
        if status < "400"
    ]
    yield from table(("status", "answer", ""), rows)
    if errors := [status for status, _ in answers if status >= "400"]:
        yield from (f"[Errors](../errors.md): {', '.join(errors)}", "")


def _described(thing: Schema) -> list[str]:
    text = str(thing.get("description", "")).replace("``", "`")
    return [text, ""] if text else []


def _answer(answer: Schema) -> str:
    kinds = [
        f"`{media_type}`" if media_type != "application/json" else _type(content.get("schema", {}))
        for media_type, content in answer.get("content", {}).items()
    ]
    return ", ".join(kind for kind in kinds if kind)


def _fields(schema: Schema) -> Iterator[tuple[str, str, str]]:
    needed = schema.get("required", ())
    for name, field in sorted(schema.get("properties", {}).items()):
        told = [
            "needed" if name in needed else "",
            _limits(field),
            cell(field.get("description", "")),
        ]
        yield f"`{name}`", _type(field), "; ".join(filter(None, told))


def _type(schema: Schema) -> str:
    """Describe a schema in words, with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for kind in ("anyOf", "oneOf"):
        if kind in schema:
            parts = [_type(each) for each in schema[kind]]
            return " or ".join(dict.fromkeys(parts))
    if "allOf" in schema:
        return " and ".join(_type(each) for each in schema["allOf"])
    match schema.get("type"):
        case "array":
            return f"list of {_type(schema.get('items', {}))}"
        case "object":
            values = schema.get("additionalProperties")
            return f"object of {_type(values)}" if isinstance(values, Mapping) else "object"
        case "string" if schema.get("format") == "binary":
            return "file"
        case str(name):
            return name
    return "any"


def _limits(schema: Schema) -> str:
    """Bounds and the default; of a value that may be null, those of the value."""
    for each in (schema, *schema.get("anyOf", ())):
        told = [
            f"{word} {each[key]}"
            for key, word in (
                *(("minimum", "≥"), ("maximum", "≤")),
                *(("exclusiveMinimum", ">"), ("exclusiveMaximum", "&lt;")),
                *(("maxLength", "characters ≤"), ("minItems", "items ≥"), ("maxItems", "items ≤")),
            )
            if key in each
        ]
        if told:
            break
    if schema.get("default") is not None:
        told.append(f"default `{json.dumps(schema['default'])}`")
    return ", ".join(told)
