"""Quotas of a tenant: named when they are met, exact under concurrency, free after a delete."""

import asyncio
import threading
from typing import Any

import httpx
import pytest

from tests.server.tenants.conftest import Build

pytestmark = pytest.mark.anyio


def _assert_told(answer: httpx.Response, status: int, limit: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == "quota_exceeded"
    assert error["message"].startswith(f"{limit}: ")
    assert "ask the operator" in error["message"]


async def test_names_are_counted_once_however_many_uploads_come_at_once(house_with: Build) -> None:
    house = house_with(acme="max_adapters = 2")
    answers = await asyncio.gather(*(house.upload("acme", f"n{i}", i % 3) for i in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [403] * 4
    refused = next(answer for answer in answers if answer.status_code == 403)
    _assert_told(refused, 403, "max_adapters")
    assert len(await house.names("acme")) == len(house.front.store.list()) == 2
    name = (await house.names("acme"))[0]
    assert (await house.upload("acme", name, 2)).status_code == 200  # no further name
    assert (await house.upload("umbra", "n0")).status_code == 201
    await house.ask("acme", "DELETE", f"/v1/adapters/{name}")
    assert (await house.upload("acme", "new")).status_code == 201
    order = {"description": "to French", "probe": False}
    _assert_told(
        await house.ask("acme", "POST", "/v1/adapters/generate", order), 403, "max_adapters"
    )
    described = {"prompt": "x", "adapter": {"description": "to French"}}
    _assert_told(await house.ask("acme", "POST", "/v1/completions", described), 403, "max_adapters")


async def test_bytes_are_counted_on_disk_and_nothing_is_left_of_what_is_refused(
    house_with: Build,
) -> None:
    house = house_with()
    n_bytes = (await house.upload("operator", "probe")).json()["n_bytes"]["disk"]
    await house.ask("operator", "DELETE", "/v1/adapters/probe")
    house.front.store.close()
    house = house_with(acme=f"max_bytes = {2 * n_bytes}")
    answers = await asyncio.gather(*(house.upload("acme", f"n{i}", i) for i in range(3)))
    assert sorted(answer.status_code for answer in answers) == [201, 201, 403]
    _assert_told(next(a for a in answers if a.status_code == 403), 403, "max_bytes")
    assert house.front.store.stats().disk_bytes == 2 * n_bytes
    store = house.front.root.parent / "store"
    assert list((store / "staging").iterdir()) == []
    assert len(list((store / "contents").glob("*/*"))) == 2
    kept, other = await house.names("acme")
    assert (await house.upload("acme", kept, int(other[1:]))).status_code == 200  # replaced
    assert (await house.upload("acme", "same-weights", int(other[1:]))).status_code == 201
    assert (await house.upload("acme", "later", int(kept[1:]))).status_code == 201
    for name in ("later", "same-weights"):
        await house.ask("acme", "DELETE", f"/v1/adapters/{name}")
    assert (await house.upload("acme", "last", int(kept[1:]))).status_code == 201


async def test_files_and_adapters_count_together(house_with: Build) -> None:
    house = house_with()
    n_bytes = (await house.upload("operator", "probe")).json()["n_bytes"]["disk"]
    await house.ask("operator", "DELETE", "/v1/adapters/probe")
    house.front.store.close()
    house = house_with(acme=f"max_bytes = {2 * n_bytes}")
    half = {"prompt": "x" * n_bytes}
    file = await house.upload_file("acme", half)
    assert file.status_code == 200, file.text
    _assert_told(await house.upload_file("acme", half), 403, "max_bytes")
    _assert_told(await house.upload("acme", "mine"), 403, "max_bytes")
    body = {"source": "source-0"}
    _assert_told(await house.ask("acme", "PUT", "/v1/adapters/mine", body), 403, "max_bytes")
    await house.ask("acme", "DELETE", f"/v1/files/{file.json()['id']}")
    assert (await house.upload("acme", "mine")).status_code == 201
    _assert_told(await house.upload_file("acme", half), 403, "max_bytes")


async def test_pins_are_counted(house_with: Build) -> None:
    house = house_with(acme="max_pins = 1")
    for number in range(3):
        await house.upload("acme", f"n{number}", number)
    answers = await asyncio.gather(
        *(house.ask("acme", "POST", f"/v1/adapters/n{i}/pin") for i in range(3))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 403, 403]
    _assert_told(next(a for a in answers if a.status_code == 403), 403, "max_pins")
    pinned = next(a for a in answers if a.status_code == 200).json()["name"]
    assert (await house.ask("acme", "POST", f"/v1/adapters/{pinned}/pin")).status_code == 200
    await house.ask("acme", "POST", f"/v1/adapters/{pinned}/unpin")
    other = next(f"n{i}" for i in range(3) if f"n{i}" != pinned)
    assert (await house.ask("acme", "POST", f"/v1/adapters/{other}/pin")).status_code == 200


async def test_running_jobs_are_counted(house_with: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that stands still while others are asked for."""
    house = house_with(umbra="max_jobs = 1")
    may_go = threading.Event()
    put_source = house.front.store.put_source

    def slow(*arguments: Any, **options: Any) -> object:
        assert may_go.wait(60)
        return put_source(*arguments, **options)

    monkeypatch.setattr(house.front.store, "put_source", slow)
    body = {"source": "source-0", "wait": False}
    answers = [await house.ask("umbra", "PUT", f"/v1/adapters/n{i}", body) for i in range(2)]
    vllm = {"lora_name": "n2", "lora_path": "source-0"}
    answers.append(await house.ask("umbra", "POST", "/v1/load_lora_adapter", vllm))
    elsewhere = await house.ask("operator", "PUT", "/v1/adapters/shared", body)
    may_go.set()
    assert answers[0].status_code == elsewhere.status_code == 202
    for answer in answers[1:]:
        _assert_told(answer, 429, "max_jobs")
        assert answer.headers["retry-after"]
    for started in (answers[0], elsewhere):
        await house.job_ends(started)
    assert await house.names("umbra") == ["n0", "shared"]
    answer = await house.ask("umbra", "PUT", "/v1/adapters/n1", {"source": "source-0"})
    assert answer.status_code == 201
