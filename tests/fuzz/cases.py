"""Case ``number`` of ``seed``: one request, always the same."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from .adapter_files import config_bytes, weights_bytes
from .schema_samples import sample
from .values import NAMES, damaged, mutated, odd_value, to_bytes

__all__ = ["Case", "make_case"]

BOUNDARY = "fuzz-boundary"
PARTS = (
    "config",
    "weights",
    "chat_template",
    "description",
    "examples",
    "adapter_config.json",
    "x",
)
FILE_NAMES = (
    *("adapter_model.safetensors", "adapter_model.bin", "../../evil", "/etc/passwd", "a\0b", ""),
    *("ü.safetensors", "x" * 2000, "adapter.zip", "config", 'q"uote'),
)
KINDS = ("application/json", "application/json; charset=utf-8", "text/plain", "", "application/xml")
TEMPLATES = (
    *("{{ messages[0].content }}", "{{", "{% for i in range(10) %}x{% endfor %}", "{{ x.y.z }}"),
    *(
        "{{ messages.__class__.__mro__ }}",
        "{% include 'x' %}",
        "\xff",
        "",
        "{{ 1/0 }}",
        "{{ [][5] }}",
    ),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}"),
)


@dataclass(frozen=True)
class Case:
    method: str
    path: str  # as sent
    headers: dict[str, str]
    content: bytes
    adapter: str | None = None  # uploaded under this name: worth a chat, if it was taken

    def __str__(self) -> str:
        shown = self.content if len(self.content) < 3000 else self.content[:3000] + b"..."
        return f"{self.method} {self.path}\n{self.headers}\n{shown!r}"


def make_case(schema: Mapping[str, Any], seed: int, number: int) -> Case:
    rng = random.Random(f"{seed}/{number}")
    if rng.random() < 0.4:
        return _upload(rng)
    operations = [
        (method, path, operation)
        for path, methods in sorted(schema["paths"].items())
        for method, operation in sorted(methods.items())
    ]
    with_body = [one for one in operations if "requestBody" in one[2]]
    method, path, operation = rng.choice(with_body if rng.random() < 0.75 else operations)
    sent_path = _path(rng, path, operation)
    body = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in body:
        if body and rng.random() < 0.8:  # a form of another route
            parts = [(name, name, to_bytes(odd_value(rng))) for name in ("file", "purpose", "x")]
            headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            return Case(method.upper(), sent_path, headers, _form(parts))
        content = b"" if rng.random() < 0.7 else to_bytes(odd_value(rng))
        return Case(method.upper(), sent_path, _headers(rng), content)
    value = sample(rng, body["application/json"]["schema"], schema)
    value = mutated(rng, value, rng.choice((0, 1, 1, 2, 3, 6)))
    content = to_bytes(value)
    if rng.random() < 0.15:
        content = damaged(rng, content)
    kind = KINDS[0] if rng.random() < 0.95 else rng.choice(KINDS)
    if rng.random() < 0.02:
        method = rng.choice(("patch", "delete", "options", "head", "trace", "put"))
    return Case(method.upper(), sent_path, {"content-type": kind, **_headers(rng)}, content)


def _upload(rng: random.Random) -> Case:
    name = rng.choice(("up/one", "up/two", "up/three")) if rng.random() < 0.9 else rng.choice(NAMES)
    # one of the two is as it should be, so that the other is looked at
    spoilt = rng.choice(("config", "config", "weights", "weights", "both", "none"))
    config = config_bytes(rng, is_good=spoilt in ("weights", "none"))
    weights = weights_bytes(rng, is_good=spoilt in ("config", "none"))
    parts = [("config", "adapter_config.json", config), ("weights", FILE_NAMES[0], weights)]
    if rng.random() < 0.2:
        parts.append(("chat_template", "", rng.choice(TEMPLATES).encode("latin-1")))
    if rng.random() < 0.1:
        parts.append((rng.choice(PARTS), rng.choice(FILE_NAMES), to_bytes(odd_value(rng))))
    if rng.random() < 0.05:
        del parts[rng.randrange(len(parts))]
    if rng.random() < 0.05:
        rng.shuffle(parts)
    content = _form(parts)
    if rng.random() < 0.1:
        content = damaged(rng, content)
    boundary = BOUNDARY if rng.random() < 0.97 else rng.choice(("", "other", "x" * 300, '"', "ü"))
    headers = {"content-type": f"multipart/form-data; boundary={boundary}", **_headers(rng)}
    return Case("PUT", f"/v1/adapters/{quote(name, safe='/')}", headers, content, name)


def _form(parts: list[tuple[str, str, bytes]]) -> bytes:
    """``parts``: field, file name (empty: none), content."""
    body = b""
    for field, file_name, content in parts:
        shown = f'; filename="{file_name}"' if file_name else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"{shown}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def _path(rng: random.Random, path: str, operation: Mapping[str, Any]) -> str:
    query = []
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            name = rng.choice(NAMES) if rng.random() < 0.7 else str(odd_value(rng))
            name = name.encode(errors="replace").decode()
            path = path.replace("{" + parameter["name"] + "}", quote(name, safe="/")[:8000])
        elif parameter["in"] == "query" and rng.random() < 0.5:
            value = str(odd_value(rng)) if rng.random() < 0.7 else str(rng.randrange(3))
            value = value.encode(errors="replace").decode()[:1000]
            query.append(f"{parameter['name']}={quote(value)}")
    return path + ("?" + "&".join(query) if query else "")


def _headers(rng: random.Random) -> dict[str, str]:
    if rng.random() < 0.8:
        return {}
    return rng.choice(
        (
            {"if-match": rng.choice(('"x"', "*", "0" * 64, f'"{"0" * 64}"', ""))},
            {"if-none-match": rng.choice(("*", "x"))},
            {"x-request-id": rng.choice(("a b", "x" * 500, "ok-1"))},
            {"content-encoding": "gzip"},
            {"accept": "text/html"},
            {"expect": "100-continue"},
            {"traceparent": "00-zz"},
            {"authorization": "Bearer x"},
        )
    )
