"""Files and batches: what is refused, what is tried again, what a restart finds."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.api.batches.batch_store import BatchLimits
from loraplex_server.api.batches.records import BatchRecord
from loraplex_server.api.batches.runner import BatchRunner
from loraplex_server.api.json_size import MAX_VALUES
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
LINE: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": COMPLETIONS,
    "body": {"model": "base", "prompt": "hi"},
}


@pytest.fixture
def tight(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    """Two files, one batch, three lines, few bytes."""
    limits = BatchLimits(max_files=2, max_bytes=2000, max_lines=3, max_active=1, n_kept=1)
    front = make_front(tokenizer, base_spec, tmp_path, batches=limits)
    yield front
    front.close()


async def _upload(front: Front, text: str | bytes, **fields: str) -> httpx.Response:
    data = {"purpose": "batch", **fields}
    return await front.client.post(
        "/v1/files", files={"file": ("calls.jsonl", text)}, data=data, headers=front.headers
    )


def _calls(n: int) -> str:
    return "\n".join(json.dumps({**LINE, "custom_id": f"call-{i}"}) for i in range(n))


async def _create(front: Front, text: str, endpoint: str = COMPLETIONS) -> httpx.Response:
    file = (await _upload(front, text)).json()["id"]
    body = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"}
    return await front.post("/v1/batches", body)


async def _ended(front: Front, created: httpx.Response) -> Any:
    assert created.status_code == 200, created.text
    url = f"/v1/batches/{created.json()['id']}?timeout_s=60"
    return (await front.client.get(url, headers=front.headers)).json()


async def _content(front: Front, file_id: str) -> list[Any]:
    answer = await front.client.get(f"/v1/files/{file_id}/content", headers=front.headers)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file has no lines"),
        ("{", "line 1: is not JSON"),
        ("\n[]", "line 2: must be an object of custom_id, method, url and body"),
        (json.dumps({**LINE, "more": 1}), "line 1: must be an object of custom_id"),
        (json.dumps({**LINE, "custom_id": 7}), "line 1: custom_id must be a text"),
        (json.dumps({**LINE, "method": "GET"}), "line 1: method must be 'POST', not 'GET'"),
        (json.dumps({**LINE, "url": "/metrics"}), "line 1: url must be one of"),
        (json.dumps({**LINE, "body": []}), "line 1: body must be an object"),
        (json.dumps({**LINE, "body": {"stream": True}}), "line 1: stream is set"),
        (f"{json.dumps(LINE)}\n{json.dumps(LINE)}", "line 2: custom_id 'a' is also that of line 1"),
        (b"\xff\xfe", "line 1: is not JSON"),
        ("\n[" + "{}," * (MAX_VALUES + 1) + "{}]", "line 2: has more than 150,000 keys and values"),
    ],
)
async def test_a_file_with_a_bad_line_is_refused(
    front: Front, text: str | bytes, told: str
) -> None:
    answer = await _upload(front, text)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_file"
    assert told in answer.json()["error"]["message"]
    assert (await front.client.get("/v1/files")).json()["data"] == []


async def test_other_forms_and_purposes_are_refused(front: Front) -> None:
    answer = await _upload(front, _calls(1), purpose="assistants")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "purpose")
    answer = await _upload(front, _calls(1), other="x")
    assert (answer.status_code, "the upload cannot be read" in answer.text) == (400, True)
    answer = await front.client.post("/v1/files", data={"purpose": "batch"})
    assert answer.status_code == 415
    answer = await front.client.post("/v1/files", files={"purpose": (None, b"batch")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


async def test_a_batch_is_of_one_endpoint_and_of_calls(front: Front) -> None:
    answer = await _create(front, _calls(1), "/v1/embeddings")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "endpoint")
    output = (await _ended(front, await _create(front, _calls(1))))["output_file_id"]
    body = {"input_file_id": output, "endpoint": COMPLETIONS, "completion_window": "24h"}
    answer = await front.post("/v1/batches", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")
    answer = await front.post("/v1/batches", {**body, "input_file_id": "file-none"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")


async def test_lines_compete_as_a_tenant_of_little_weight(front: Front) -> None:
    await _ended(front, await _create(front, _calls(2)))
    await front.complete()
    of_batch, _, of_client = [request.share for request in front.engine.requests]
    assert of_batch.tenant == "batch:"
    assert of_batch.weight < of_client.weight / 50
    assert of_client.tenant == ""


async def test_a_full_queue_delays_lines_and_fails_none(front: Front) -> None:
    front.engine.max_queue = 1
    ended = await _ended(front, await _create(front, _calls(4)))
    assert ended["status"] == "completed"
    assert ended["request_counts"] == {"total": 4, "completed": 4, "failed": 0}


async def test_quotas_and_limits_name_what_is_too_much(tight: Front) -> None:
    answer = await _upload(tight, _calls(4))
    assert (answer.status_code, "at most 3 lines" in answer.text) == (400, True)
    answer = await _upload(tight, "\n" * 4)
    assert (answer.status_code, "line 4: at most 3 lines" in answer.text) == (400, True)
    answer = await _upload(tight, json.dumps({**LINE, "body": {"prompt": "x" * 2000}}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_exceeded")
    tight.engine.manual = True
    running = await _create(tight, _calls(1))
    answer = await _create(tight, _calls(1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
    answer = await _upload(tight, _calls(1))
    assert (answer.status_code, "2 are allowed" in answer.text) == (403, True)
    cancelled = await tight.client.post(f"/v1/batches/{running.json()['id']}/cancel")
    assert cancelled.status_code == 200
    assert (await _ended(tight, running))["status"] == "cancelled"
    assert tight.engine.cancelled  # what ran for it


async def test_old_batches_are_forgotten(tight: Front) -> None:
    file = (await _upload(tight, _calls(1))).json()["id"]
    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
    for _ in range(3):
        last = await tight.post("/v1/batches", body)
        ended = await _ended(tight, last)
        await tight.client.delete(f"/v1/files/{ended['output_file_id']}")
    listed = (await tight.client.get("/v1/batches")).json()
    assert [batch["id"] for batch in listed["data"]] == [last.json()["id"]]


async def test_a_restart_ends_what_has_expired_and_removes_what_a_crash_left(front: Front) -> None:
    runner: BatchRunner = front.app.state.parts.batches
    front.engine.manual = True  # no line is answered
    created = await _create(front, _calls(3))
    await front.engine.arrival(3)
    await runner.close()  # as a kill does it: the batch is in progress
    folder = front.store.root / "batches"
    with closing(sqlite3.connect(folder / "batches.sqlite3")) as db, db:
        db.execute("UPDATE batch SET expires = 1")
    (folder / "files" / "file-left").write_text("half")
    await runner.resume()
    ended = await _ended(front, created)
    assert ended["status"] == "expired"
    assert ended["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    lines = await _content(front, ended["error_file_id"])
    assert [line["custom_id"] for line in lines] == ["call-0", "call-1", "call-2"]
    assert {line["error"]["code"] for line in lines} == {"batch_expired"}
    assert not (folder / "files" / "file-left").exists()


async def test_the_end_of_a_large_batch_lets_others_through(front: Front) -> None:
    runner: BatchRunner = front.app.state.parts.batches
    front.engine.manual = True
    created = await _create(front, _calls(5))
    await front.engine.arrival(5)
    await runner.close()
    batch_id = created.json()["id"]
    for line in range(1, 6):
        answer = json.dumps(["x" * (5 << 20)]).encode()
        runner.store.add_answer(batch_id, line, answer, is_failure=False)
    finishing = asyncio.create_task(runner._finish("", batch_id))
    await asyncio.sleep(0)
    await runner.do("other", lambda: runner.store.n_bytes("other"))
    assert not finishing.done()
    await finishing
    ended = await _ended(front, created)
    assert ended["status"] == "completed"
    assert len(await _content(front, ended["output_file_id"])) == 5
    await runner.resume()  # deletes the answers, which are in the file
    await runner._tasks[""]
    with closing(sqlite3.connect(front.store.root / "batches" / "batches.sqlite3")) as db:
        assert db.execute("SELECT count(*) FROM answer").fetchone() == (0,)


async def test_a_batch_whose_file_has_vanished_fails(front: Front) -> None:
    runner: BatchRunner = front.app.state.parts.batches
    front.engine.manual = True
    created = await _create(front, _calls(2))
    await front.engine.arrival(2)
    await runner.close()
    (front.store.root / "batches" / "files" / created.json()["input_file_id"]).unlink()
    await runner.resume()
    ended = await _ended(front, created)
    assert ended["status"] == "failed"
    assert ended["errors"]["data"][0]["message"] == "a file of this batch is missing"


async def test_a_batch_of_a_key_that_is_gone_answers_nothing(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    old, new = "old-key-1", "new-key-1"
    http = HttpConfig(api_keys=(ApiKey.of(old, Scope.INFER),))
    front = make_front(tokenizer, base_spec, tmp_path, http)
    front.headers = {"authorization": f"Bearer {old}"}
    front.engine.manual = True
    created = await _create(front, _calls(2))
    await front.engine.arrival(2)
    await front.app.state.parts.batches.close()
    await front.close_workers()
    front.store.close()
    http = HttpConfig(api_keys=(ApiKey.of(new, Scope.INFER),))
    front = make_front(tokenizer, base_spec, tmp_path, http)
    runner: BatchRunner = front.app.state.parts.batches
    await runner.resume()
    tenant = ApiKey.of(old, Scope.INFER).tenant
    ended = await runner.wait(tenant, created.json()["id"], 60)
    assert (ended.n_completed, ended.n_failed) == (0, 2)
    assert not front.engine.requests
    front.store.close()


async def test_off_loopback_without_keys_there_are_no_files(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    http = HttpConfig(host="0.0.0.0", insecure=True)
    front = make_front(tokenizer, base_spec, tmp_path, http)
    for path in ("/v1/files", "/v1/batches", "/v1/files/file-x/content"):
        answer = await front.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "writes_disabled")
    front.store.close()


async def test_a_file_larger_than_the_setting_is_refused_while_it_comes(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    http = HttpConfig(max_batch_file_bytes=1000)
    front = make_front(tokenizer, base_spec, tmp_path, http)
    answer = await _upload(front, _calls(20))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    front.store.close()


async def test_waiting_for_a_batch_holds_up_nothing(front: Front) -> None:
    front.engine.manual = True
    created = await _create(front, _calls(1))
    waiting = asyncio.create_task(_ended(front, created))
    await front.engine.arrival(1)
    assert (await front.client.get("/v1/batches")).json()["data"][0]["status"] == "in_progress"
    assert not waiting.done()
    await front.client.post(f"/v1/batches/{created.json()['id']}/cancel")
    assert (await waiting)["status"] == "cancelled"


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_batch_that_is_cancelled_at_its_very_start_is_cancelled(
    front: Front, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    """Between the look for the next batch and its start; its end may even be written by then."""
    store = front.app.state.parts.batches.store
    begin = store.begin

    def cancelled_before(tenant: str, batch_id: str) -> BatchRecord:
        store.cancel(tenant, batch_id)
        if has_ended:
            list(store.finish(tenant, batch_id))
        started: BatchRecord = begin(tenant, batch_id)
        return started

    monkeypatch.setattr(store, "begin", cancelled_before)
    ended = await _ended(front, await _create(front, _calls(3)))
    assert (ended["status"], ended["error_file_id"]) == ("cancelled", None)
    assert not front.engine.requests
