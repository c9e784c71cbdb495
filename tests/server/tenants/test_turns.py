"""New descriptions of one tenant go between those of another."""

import asyncio

import pytest

from tests.server.tenants.conftest import House

pytestmark = pytest.mark.anyio


async def test_a_description_waits_for_one_of_another_tenant(house: House) -> None:
    parts = house.front.app.state.parts
    waiting = parts.pools.generation._shares._waiting
    ended: list[str] = []

    async def describe(tenant: str, number: int) -> None:
        body = {"description": f"number {number}"}
        answer = await house.ask(tenant, "POST", "/v1/adapters/generate", body)
        assert answer.status_code == 201, answer.text
        ended.append(tenant)

    with parts.makers.generated._lock:  # the first one runs until it is released
        calls = [asyncio.create_task(describe("acme", number)) for number in range(6)]
        while len(waiting.get("acme", ())) < 5:
            await asyncio.sleep(0)
        calls.append(asyncio.create_task(describe("umbra", 9)))
        while "umbra" not in waiting:
            await asyncio.sleep(0)
    await asyncio.gather(*calls)
    assert ended.index("umbra") <= 2, ended


async def test_the_probes_of_a_new_adapter_are_requests_of_its_tenant(house: House) -> None:
    body = {"description": "a new one"}
    answer = await house.ask("acme", "POST", "/v1/adapters/generate", body)
    assert answer.status_code == 201, answer.text
    tenants = [request.share.tenant for request in house.front.engine.requests]
    assert tenants
    assert set(tenants) == {"acme"}
