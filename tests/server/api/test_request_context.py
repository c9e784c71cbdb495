"""Headers, logs and back-pressure around every request."""

import json
import logging

import pytest

from loraplex_server.engine.errors import EngineDraining
from loraplex_server.logs import JsonFormatter
from tests.server.conftest import Front

pytestmark = pytest.mark.anyio


async def test_the_caller_s_request_id_is_echoed_and_others_are_made(front: Front) -> None:
    answer = await front.post("/v1/completions", {"prompt": "x"}, **{"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for bad in (b"a b", b"x" * 200, b"\xc3\xa9", b"<script>"):
        answer = await front.client.get("/health", headers=[(b"x-request-id", bad)])
        assert answer.headers["x-request-id"].startswith("req-")
    assert answer.headers["openai-processing-ms"].isdigit()


async def test_errors_and_streams_have_the_headers_too(front: Front) -> None:
    for answer in (await front.chat(temperature=9), await front.chat(stream=True)):
        assert answer.headers["x-request-id"]
        assert answer.headers["openai-processing-ms"].isdigit()


async def test_logs_are_json_with_the_request_id_and_what_was_done(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("loraplex.access")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "loraplex.access"):
            await front.post("/v1/completions", {"prompt": "hi"}, **{"x-request-id": "abc"})
    finally:
        logger.removeHandler(handler)
    entry = json.loads(lines[-1])
    assert entry["request_id"] == "abc"
    assert entry["path"] == "/v1/completions"
    assert entry["status"] == 200
    assert entry["adapter"] == "base"
    assert entry["prompt_tokens"] == len(front.engine.requests[0].prompt_ids)
    assert entry["output_tokens"] > 0
    assert entry["duration_ms"] >= 0


async def test_a_full_queue_is_a_429_with_retry_after(front: Front) -> None:
    front.engine.max_queue = 0
    for stream in (True, False):
        answer = await front.chat(stream=stream)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "2"
        assert answer.headers["retry-after-ms"] == "1500"
        assert answer.json()["error"]["code"] == "queue_full"


async def test_a_draining_server_is_not_ready_and_answers_503(front: Front) -> None:
    front.app.state.parts.lifecycle.is_draining = True
    for answer in (await front.chat(), await front.client.get("/ready")):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "server_draining"
    assert (await front.client.get("/health")).status_code == 200


async def test_a_dead_engine_is_a_503_everywhere(front: Front) -> None:
    front.engine.die()
    for answer in (
        await front.chat(),
        await front.chat(stream=True),
        await front.client.get("/health"),
        await front.client.get("/ready"),
    ):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
    assert (await front.client.get("/metrics")).status_code == 200


async def test_an_engine_that_drains_ends_a_whole_answer_with_a_503(front: Front) -> None:
    front.engine.manual = True
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    async with front.call("/v1/chat/completions", body) as call:
        await front.engine.arrival()
        front.engine.step()
        front.engine.fail(EngineDraining("the server went down"))
        assert b"server_draining" in await call.next_body()
        assert call.status == 503


async def test_a_bug_is_a_500_in_openai_s_shape_and_the_server_lives_on(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: object) -> list[int]:
        raise RuntimeError("secret detail")

    front.engine.answer, kept = broken, front.engine.answer
    for stream in (True, False):
        answer = await front.chat(stream=stream)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
    assert "secret detail" in caplog.text
    front.engine.answer = kept
    assert (await front.chat()).status_code == 200


async def test_a_path_cannot_forge_a_line_of_the_log(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loraplex.access"):
        await front.client.get("/x%0aINFO%20forged")
    assert all("\n" not in record.getMessage() for record in caplog.records)
