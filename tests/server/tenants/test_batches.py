"""Files and batches of one tenant are as missing ones to every other."""

from typing import Any

import pytest

from tests.server.tenants.conftest import House, comparable

pytestmark = pytest.mark.anyio

MISSING = {"file": "file-0", "batch": "batch_0"}


async def _run(house: House, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """The ended batch of one line, which was answered."""
    file = await house.upload_file(key, body)
    assert file.status_code == 200, file.text
    batch = {
        "input_file_id": file.json()["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    created = await house.ask(key, "POST", "/v1/batches", batch)
    assert created.status_code == 200, created.text
    url = f"/v1/batches/{created.json()['id']}?timeout_s=60"
    ended: dict[str, Any] = (await house.ask(key, "GET", url)).json()
    return ended


async def test_anothers_files_and_batches_are_missing(house: House) -> None:
    ended = await _run(house, "acme", {"model": "base", "prompt": "hi"})
    assert ended["status"] == "completed"
    ids = {"file": ended["output_file_id"], "batch": ended["id"]}
    asked: list[tuple[str, str, Any]] = [
        ("GET", "/v1/files/{file}", None),
        ("GET", "/v1/files/{file}/content", None),
        ("DELETE", "/v1/files/{file}", None),
        ("GET", "/v1/files?after={file}", None),
        ("GET", "/v1/batches/{batch}", None),
        ("POST", "/v1/batches/{batch}/cancel", None),
        ("GET", "/v1/batches?after={batch}", None),
    ]
    for key in ("umbra", "operator"):
        for method, path, body in asked:
            theirs = await house.ask(key, method, path.format(**ids), body)
            missing = await house.ask(key, method, path.format(**MISSING), body)
            assert theirs.status_code in (400, 404)
            shown = comparable(theirs)[2]
            for kind, id in ids.items():
                shown = shown.replace(id, MISSING[kind])
            assert (theirs.status_code, shown) == (missing.status_code, comparable(missing)[2])
        for path in ("/v1/files", "/v1/batches"):
            assert (await house.ask(key, "GET", path)).json()["data"] == []
        body = {"input_file_id": ended["input_file_id"], "endpoint": "/v1/completions"}
        used = await house.ask(key, "POST", "/v1/batches", {**body, "completion_window": "24h"})
        assert used.status_code == 404
    for path in (f"/v1/files/{ids['file']}", f"/v1/batches/{ids['batch']}"):
        assert (await house.ask("acme-reader", "GET", path)).status_code == 200


async def test_a_line_uses_the_adapters_of_its_tenant_alone(house: House) -> None:
    assert (await house.upload("acme", "mine")).status_code == 201
    body = {"model": "base", "prompt": "hi", "adapter": "mine"}
    assert (await _run(house, "acme-reader", body))["request_counts"]["completed"] == 1
    assert (await _run(house, "umbra", body))["request_counts"]["failed"] == 1
    assert [request.share.tenant for request in house.front.engine.requests] == ["batch:acme"]


async def test_a_metrics_key_has_no_files(house: House) -> None:
    for path in ("/v1/files", "/v1/batches"):
        assert (await house.ask("prometheus", "GET", path)).status_code == 403
