"""Case ``number`` of ``seed``: one request, always the same."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import quote

from .adapter_files import config_bytes, weights_bytes
from .schema_samples import sample
from .values import NAMES, damaged, deepened, mutated, odd_value, to_bytes

Wire = Literal["trailers", "two hosts"]
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
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")  # of batches
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
    endpoint: str | None = None  # of the calls in an uploaded file: worth a batch, if it was taken
    route: tuple[str, str] | None = None  # the documented method and path
    wire: Wire | None = None  # a fault that no HTTP client would send

    def __str__(self) -> str:
        shown = self.content if len(self.content) < 3000 else self.content[:3000] + b"..."
        return f"{self.method} {self.path} {self.wire or ''}\n{self.headers}\n{shown!r}"

    def to_wire(self, host: bytes) -> bytes:
        """Return the request with its fault, as bytes."""
        hosts = [host, b"evil.example"] if self.wire == "two hosts" else [host]
        fields = [b"host: %s" % name for name in hosts]
        fields += [f"{name}: {value}".encode() for name, value in self.headers.items()]
        body = b"%x\r\n%s\r\n" % (len(self.content), self.content) if self.content else b""
        trailers = b"authorization: Bearer x\r\n" if self.wire == "trailers" else b""
        line = f"{self.method} {self.path} HTTP/1.1".encode()
        head = b"\r\n".join([line, *fields, b"connection: close", b"transfer-encoding: chunked"])
        return head + b"\r\n\r\n" + body + b"0\r\n" + trailers + b"\r\n"


def make_case(schema: Mapping[str, Any], seed: int, number: int) -> Case:
    case = _make_case(schema, random.Random(f"{seed}/{number}"), number)
    faults: dict[int, Wire] = {3: "trailers", 63: "two hosts"}
    return replace(case, wire=faults.get(number % 100))


def _make_case(schema: Mapping[str, Any], rng: random.Random, number: int) -> Case:
    operations = [
        (method, path, operation)
        for path, methods in sorted(schema["paths"].items())
        for method, operation in sorted(methods.items())
    ]
    if number % 10 == 0:  # all routes in turn
        method, path, operation = operations[number // 10 % len(operations)]
    elif (kind := rng.random()) < 0.4:
        return _upload(rng)
    elif kind < 0.44:
        return _calls(rng, schema)
    else:
        with_body = [one for one in operations if "requestBody" in one[2]]
        method, path, operation = rng.choice(with_body if rng.random() < 0.75 else operations)
    return _call(rng, schema, method, path, operation)


def _call(
    rng: random.Random,
    schema: Mapping[str, Any],
    method: str,
    path: str,
    operation: Mapping[str, Any],
) -> Case:
    route = (method, path)
    sent_path = _path(rng, path, operation)
    body = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in body:
        if body and rng.random() < 0.8:  # a form of another route
            parts = [(name, name, to_bytes(odd_value(rng))) for name in ("file", "purpose", "x")]
            headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            return Case(method.upper(), sent_path, headers, _form(parts), route=route)
        content = b"" if rng.random() < 0.7 else to_bytes(odd_value(rng))
        return Case(method.upper(), sent_path, _headers(rng), content, route=route)
    value = sample(rng, body["application/json"]["schema"], schema)
    value = mutated(rng, value, rng.choice((0, 1, 1, 2, 3, 6)))
    if rng.random() < 0.05:
        value = deepened(rng, value)
    content = to_bytes(value)
    if rng.random() < 0.15:
        content = damaged(rng, content)
    kind = KINDS[0] if rng.random() < 0.95 else rng.choice(KINDS)
    if rng.random() < 0.02:
        method = rng.choice(("patch", "delete", "options", "head", "trace", "put"))
    headers = {"content-type": kind, **_headers(rng)}
    return Case(method.upper(), sent_path, headers, content, route=route)


def _calls(rng: random.Random, schema: Mapping[str, Any]) -> Case:
    """A file of calls for a batch."""
    endpoint = rng.choice(ENDPOINTS)
    body = schema["paths"][endpoint]["post"]["requestBody"]["content"]["application/json"]
    lines = []
    for number in range(rng.randrange(1, 4)):
        value = mutated(rng, sample(rng, body["schema"], schema), rng.choice((0, 0, 1, 2)))
        line = {"custom_id": f"{number}", "method": "POST", "url": endpoint, "body": value}
        if isinstance(value, dict) and rng.random() < 0.9:
            value.pop("stream", None)
        line = mutated(rng, line, 1) if rng.random() < 0.1 else line
        lines.append(to_bytes(deepened(rng, line) if rng.random() < 0.1 else line))
    content = rng.choice((b"\n", b"\n", b"\n\n", b"\r\n", b"")).join(lines)
    if rng.random() < 0.15:
        content = damaged(rng, content)
    parts = [("file", rng.choice(FILE_NAMES), content), ("purpose", "", b"batch")]
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    return Case("POST", "/v1/files", headers, _form(parts), endpoint=endpoint)


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
        is_id = parameter["in"] == "path" and parameter["name"] != "name"
        if is_id and rng.random() < 0.5:
            continue  # the campaign knows something that exists
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
