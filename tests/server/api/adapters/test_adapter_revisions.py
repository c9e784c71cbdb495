"""GET revisions and POST rollback; the older contents of a name by their digest."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora

pytestmark = pytest.mark.anyio


@pytest.fixture
def front(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    front = make_front(tokenizer, base_spec, tmp_path, n_kept_revisions=2)
    for number in range(4):
        write_lora(front.root / f"v{number}", base_spec, seed=number)
    yield front
    front.store.close()


async def put(front: Front, version: int) -> str:
    answer = await front.client.put("/v1/adapters/team/x", json={"source": f"v{version}"})
    assert answer.is_success, answer.text
    return str(answer.json()["digest"])


async def roll_back(front: Front, query: str = "", **headers: str) -> httpx.Response:
    return await front.client.post(f"/v1/adapters/team/x/rollback{query}", headers=headers)


async def used(front: Front, selector: str) -> str:
    answer = await front.chat(adapter=selector)
    return str(answer.json()["adapter"]["digest"]) if answer.is_success else str(answer.status_code)


async def test_the_last_contents_are_listed_and_can_be_asked_for(front: Front) -> None:
    digests = [await put(front, version) for version in range(4)]
    listed = (await front.client.get("/v1/adapters/team/x/revisions")).json()["data"]
    assert [entry["digest"] for entry in listed] == digests[:0:-1]
    assert [entry["revision"] for entry in listed] == [4, 3, 2]
    assert [entry["current"] for entry in listed] == [True, False, False]
    assert await used(front, f"team/x@{digests[1][:12]}") == digests[1]
    assert await used(front, f"team/x@{digests[0][:12]}") == "404"
    assert (await front.client.get("/v1/adapters/nobody/revisions")).status_code == 404


async def test_a_rollback_is_one_call(front: Front) -> None:
    first, second = await put(front, 0), await put(front, 1)
    answer = await roll_back(front)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["digest"], answer.json()["revision"]) == (first, 3)
    assert answer.headers["etag"] == f'"{first}"'
    assert await used(front, "team/x") == first
    assert await used(front, f"team/x@{second[:12]}") == second


async def test_a_rollback_to_a_digest_compares_and_sets(front: Front) -> None:
    first, second, third = [await put(front, version) for version in range(3)]
    stale = await roll_back(front, f"?digest={first[:8]}", **{"if-match": f'"{second}"'})
    assert stale.status_code == 412
    assert await used(front, "team/x") == third
    answer = await roll_back(front, f"?digest={first[:8]}", **{"if-match": f'"{third}"'})
    assert answer.json()["digest"] == first


async def test_a_rollback_to_what_is_not_kept_says_what_is(front: Front) -> None:
    assert (await roll_back(front)).status_code == 404
    first = await put(front, 0)
    answer = await roll_back(front)
    assert answer.status_code == 400
    assert "kept: none" in answer.json()["error"]["message"]
    await put(front, 1)
    answer = await roll_back(front, "?digest=0000")
    assert answer.status_code == 400
    assert first[:12] in answer.json()["error"]["message"]
