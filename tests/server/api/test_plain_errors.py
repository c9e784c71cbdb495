"""Errors are told in JSON's words: no class of ours, of pydantic's or of Python's is in them."""

import re
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from loraplex_server.api import protocol
from tests.server.conftest import Front

pytestmark = pytest.mark.anyio

WRONG: tuple[Any, ...] = ({"odd": 1}, [None], [{"type": "odd"}], True, 1.5)


def _class_names() -> set[str]:
    names = {"NoneType", "UploadFile", "JSONDecodeError", "ValidationError", "RootModel"}
    for module in iter_modules(protocol.__path__, f"{protocol.__name__}."):
        for name, found in vars(import_module(module.name)).items():
            if isinstance(found, type) and issubclass(found, BaseModel):
                names.add(name)
    return names


_INSIDE = re.compile(
    r"\b(?:" + "|".join(_class_names()) + r")\b|<class|instance of|dictionary|\bdict\b|\bNone\b"
    r"|\bTrue\b|\bFalse\b|object at 0x|validator|union\["
)


def _wrong_bodies(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(method, path, body) with one field of the body that is not as the schema says."""
    for path, methods in schema["paths"].items():
        path = path.replace("{name}", "x").replace("{model_id}", "x")
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            body = _resolved(content.get("application/json", {}).get("schema"), schema)
            for field in (body or {}).get("properties", ()):
                for value in WRONG:
                    required = {name: "x" for name in body.get("required", ()) if name != field}
                    yield method, path, {**required, field: value}
            if body:
                yield method, path, [None]


def _resolved(part: dict[str, Any] | None, schema: dict[str, Any]) -> dict[str, Any] | None:
    if part is None:
        return None
    if "$ref" in part:
        found: dict[str, Any] = schema["components"]["schemas"][part["$ref"].rpartition("/")[2]]
        return found
    return part


async def test_no_error_of_a_body_names_a_class(front: Front) -> None:
    schema = (await front.client.get("/openapi.json")).json()
    n_refused, found = 0, set()
    for method, path, body in _wrong_bodies(schema):
        answer = await front.client.request(method, path, json=body)
        if answer.status_code >= 400:
            n_refused += 1
            if told := _INSIDE.search(_shown(answer)):
                found.add((path, told[0], _shown(answer)[:200]))
    assert found == set()
    assert n_refused > 500


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": [None]}, "not a list with null as item 0"),
        ({"prompt": ["a", True]}, "not a list with true as item 1"),
        ({"prompt": {"a": None}}, "not {'a': null}"),
        ({"prompt": "x", "adapter": {"name": None}}, "must be a string, not null"),
        ({"prompt": "x", "response_format": 5}, "input should be an object, not 5"),
    ],
)
async def test_what_was_sent_is_told_as_json_has_it(
    front: Front, body: dict[str, Any], told: str
) -> None:
    answer = await front.complete(**body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


async def test_an_unforeseen_failure_names_no_class(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("in /home/secret")

    monkeypatch.setattr(front.app.state.parts.resolver, "parse", fail)
    front.client._transport = httpx.ASGITransport(front.app, raise_app_exceptions=False)
    for _ in range(3):
        answer = await front.complete()
        assert answer.status_code == 500
        assert "RuntimeError" not in answer.text
        assert "secret" not in answer.text
    health = await front.client.get("/health")
    assert health.json()["degraded"][0]["problem"] == "an unexpected error"


def _shown(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return f"{error['message']} {error['param'] or ''}"
