"""Renders the report as one HTML page without scripts, with a table for each section."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """body{font:15px system-ui;margin:2em auto;max-width:70em;padding:0 1em}
table{border-collapse:collapse;margin:.5em 0}td,th{border:1px solid #ccc;padding:.2em .6em}
td{text-align:right}td:first-child,th{text-align:left}.failed,.stopped{color:#b00}"""


def render(document: Mapping[str, Any]) -> str:
    """Render ``document``, which has the shape of ``report.json``."""
    device = document["device"]
    facts = [*device.items(), ("commit", document["commit"]), ("started", document["started_at"])]
    versions = [(name, value or "not installed") for name, value in document["versions"].items()]
    parts = [
        "<!doctype html><meta charset=utf-8><title>GPU report</title>",
        f"<style>{_STYLE}</style><h1>{_text(device.get('name', 'GPU'))}</h1>",
        _table(("", ""), [*facts, *versions]),
    ]
    for section in document["sections"]:
        state = section["state"]
        parts.append(f"<h2>{_text(section['name'])}</h2>")
        parts.append(f"<p class={_text(state)}>{_text(state)}, {section['seconds']:g} s")
        parts.append(f": {_text(section['why'])}</p>" if section["why"] else "</p>")
        parts += [_table(rows[0], rows[1:]) for rows in _tables(section["result"]) if rows]
    return "\n".join(parts) + "\n"


def _tables(result: Mapping[str, Any]) -> Iterable[list[Sequence[Any]]]:
    """Render plain values in one table, and each list of records in a table of its own."""
    plain = [(k, v) for k, v in result.items() if not isinstance(v, list)]
    if plain:
        yield [("", ""), *plain]
    for value in result.values():
        if isinstance(value, list) and value:
            columns = list(value[0])
            yield [columns, *([record.get(c, "") for c in columns] for record in value)]


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["".join(f"<td>{_text(value)}</td>" for value in row) for row in rows]
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: object) -> str:
    return html.escape(f"{value:,.4g}" if isinstance(value, float) else str(value))
