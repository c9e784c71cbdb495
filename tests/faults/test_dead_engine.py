"""Answers of each route after the engine's thread has died, as docs/errors.md says."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.engine.engine import Engine
from tests.faults.conftest import World
from tests.support.bases.architectures import tiny_model
from tests.support.servers.asgi_call import events_of
from tests.support.servers.engines import running_engine

pytestmark = pytest.mark.anyio

ANSWERED_S = 15  # at once on a quiet machine; what hangs would never answer
MESSAGES = [{"role": "user", "content": "hi"}]
PAIR = {"text_1": "a", "text_2": "b"}
PAIR_TO_LEARN = {"prompt": "a", "answer": "b"}
RANK = {"query": "a", "documents": ["b"]}
LINE = b'{"custom_id":"1","method":"POST","url":"/v1/completions","body":{"prompt":"hi"}}'

# (method, path) → what is sent (JSON; for the last, options of httpx) and the status
NEEDS_ENGINE: dict[tuple[str, str], Any] = {
    ("POST", "/v1/chat/completions"): {"messages": MESSAGES},
    ("POST", "/v1/completions"): {"prompt": "hi"},
    ("POST", "/v1/messages"): {"messages": MESSAGES, "max_tokens": 3},
    ("POST", "/v1/messages/count_tokens"): {"messages": MESSAGES},
    ("POST", "/v1/responses"): {"input": "hi"},
    **{("POST", f"/generate{end}"): {"inputs": "hi"} for end in ("", "_stream")},
    ("POST", "/v1/embeddings"): {"input": "hi"},
    ("POST", "/pooling"): {"input": "hi"},
    ("POST", "/classify"): {"input": "hi"},
    **dict.fromkeys([("POST", "/score"), ("POST", "/v1/score")], PAIR),
    **dict.fromkeys([("POST", f"{v}/rerank") for v in ("", "/v1", "/v2")], RANK),
    ("PUT", "/v1/adapters/{name}"): {"source": "canary"},
    ("PATCH", "/v1/adapters/{name}"): {"description": "x"},
    ("DELETE", "/v1/adapters/{name}"): None,
    **{
        ("POST", f"/v1/adapters/{{name}}/{action}"): None
        for action in ("pin", "unpin", "warm", "unload", "rollback")
    },
    ("POST", "/v1/adapters/generate"): {"description": "x"},
    ("POST", "/v1/adapters/train"): {"name": "x", "examples": [PAIR_TO_LEARN] * 2},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "x", "lora_path": "canary"},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "lora"},
    ("POST", "/load_lora_adapter"): {"lora_name": "x", "lora_path": "canary"},
    ("POST", "/unload_lora_adapter"): {"lora_name": "lora"},
    ("POST", "/v1/batches"): {"input_file_id": "{file_id}", "endpoint": "/v1/completions",
                              "completion_window": "24h"},
    ("GET", "/health"): None,
    ("GET", "/ready"): None,
    ("GET", "/ping"): None,
}  # fmt: skip
WORKS: dict[tuple[str, str], Any] = {
    ("POST", "/tokenize"): {"messages": MESSAGES},
    ("POST", "/detokenize"): {"tokens": [5]},
    ("POST", "/v1/route"): {"input": "Arr"},
    **{("POST", f"/v1/{of}/cancel"): None for of in ("batches/{batch_id}", "jobs/{job_id}")},
    **{
        ("GET", path): None
        for path in (
            "/info",
            *("/v1/models", "/v1/models/{model_id}", "/v1/adapters", "/v1/adapters/{name}"),
            *("/v1/adapters/{name}/revisions", "/v1/adapters/{name}/routing", "/v1/jobs/{job_id}"),
            "/v1/jobs/{job_id}/events",
            *("/v1/responses/{response_id}", "/v1/batches", "/v1/batches/{batch_id}"),
            *("/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"),
            *("/metrics", "/version", "/v1/live", "/v1/requests", "/v1/cluster"),
        )
    },
    ("DELETE", "/v1/responses/{response_id}"): None,
    ("DELETE", "/v1/files/{file_id}"): None,
}
UPLOAD = ("POST", "/v1/files")  # for batches: a form


class _OutOfLuck(BaseException):
    """An error that no request causes."""


def _die_while_running(engine: Engine, n_requests: int) -> None:
    """The first step of so many requests that have all answered ends the thread.

    A stream answers 200 with its first text, and one token may be a part of a letter.
    """
    run_step = engine.loop.runner.run

    def run(chunks: Any) -> Any:
        if len(chunks) < n_requests or any(c.request.n_output < 20 for c in chunks):
            return run_step(chunks)
        raise _OutOfLuck("out of luck at /home/secret")

    engine.loop.runner.run = run  # type: ignore[method-assign]


async def _send(world: World, method: str, path: str, **options: Any) -> httpx.Response:
    """Answered at once: never a request that hangs."""
    async with asyncio.timeout(ANSWERED_S):
        return await world.client.request(method, path, **options)


async def _upload(world: World) -> httpx.Response:
    files = {"file": ("calls.jsonl", LINE), "purpose": (None, b"batch")}
    return await _send(world, "POST", "/v1/files", files=files)


async def _ids(world: World) -> dict[str, str]:
    """Return names of existing things, for the parameters of paths."""
    body = {"input": "hi", "max_output_tokens": 3}
    response = await world.client.post("/v1/responses", json=body)
    file = (await _upload(world)).json()["id"]
    batch = {
        "input_file_id": file,
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    started = await world.client.post("/v1/batches", json=batch)
    put = {"source": str(world.folder / "canary"), "wait": False}
    job = await world.client.put("/v1/adapters/later", json=put)
    await world.client.post("/v1/route", json={"input": "Arr"})  # the encoder loads
    return {
        "name": "mola",
        "model_id": "lora",
        "response_id": response.json()["id"],
        "file_id": file,
        "batch_id": started.json()["id"],
        "job_id": job.json()["id"],
    }


@pytest.fixture
def doomed(
    open_world: Callable[[Engine], AbstractContextManager[World]],
) -> Iterator[World]:
    """Yield a world with an engine of its own."""
    model = tiny_model(max_position_embeddings=4096)  # without an end: only death stops it
    with (
        running_engine(model, kv_memory_bytes=8 << 20) as engine,
        open_world(engine) as world,
    ):
        yield world


async def test_a_dead_engine_is_told_by_every_route_at_once(doomed: World) -> None:
    paths = (await doomed.client.get("/openapi.json")).json()["paths"]
    # They need --allow-training, and a base of images.
    off = ("/v1/fine_tuning", "/v1/classify/zero-shot")
    routes = {(m.upper(), path) for path in paths if not path.startswith(off) for m in paths[path]}
    assert routes == {*NEEDS_ENGINE, *WORKS, UPLOAD}
    ids = await _ids(doomed)
    await _check_streams_end(doomed)
    doomed.engine._thread.join(60)

    for (method, path), body in NEEDS_ENGINE.items():
        if isinstance(body, dict):
            body = {k: ids["file_id"] if v == "{file_id}" else v for k, v in body.items()}
        answer = await _send(doomed, method, path.format(**ids), json=body)
        _check_told(answer, path)
    _check_told(await _upload(doomed), "/v1/files")
    answers = [
        await _send(doomed, method, path.format(**ids), json=body)
        for (method, path), body in WORKS.items()
    ]
    assert [(str(a.request.url), a.text) for a in answers if a.status_code != 200] == []
    metrics = text_string_to_metric_families((await _send(doomed, "GET", "/metrics")).text)
    (up,) = [family for family in metrics if family.name == "loraplex_engine_up"]
    assert up.samples[0].value == 0


async def _check_streams_end(world: World) -> None:
    """Streams of every kind run as the engine dies; each ends with an error event."""
    more = {"max_tokens": 2000}
    bodies: dict[str, dict[str, object]] = {
        "/v1/completions": {"prompt": "hi", **more},
        "/v1/chat/completions": {"messages": MESSAGES, **more},
        "/v1/messages": {"messages": MESSAGES, **more},
        "/v1/responses": {"input": "hi", "max_output_tokens": 2000},
    }
    _die_while_running(world.engine, len(bodies) + 1)
    async with asyncio.timeout(60):
        *answers, whole = await asyncio.gather(
            *(
                world.client.post(path, json=body | {"stream": True})
                for path, body in bodies.items()
            ),
            world.ask("lora", max_tokens=2000),
        )
        _check_told(whole, "/v1/completions")
        for path, answer in zip(bodies, answers, strict=True):
            assert answer.status_code == 200
            assert "engine" in answer.text, path
            assert "secret" not in answer.text
            if path.endswith("completions"):
                assert events_of(answer.content)[-1] == "[DONE]"
                assert events_of(answer.content)[-2]["error"]["code"] == "engine_dead"
            else:
                assert "event: error" in answer.text or "response.failed" in answer.text, path


def _check_told(answer: httpx.Response, path: str) -> None:
    assert answer.status_code == 503, (path, answer.text)
    error = answer.json()["error"]
    assert error["code"] == "engine_dead", (path, answer.text)
    assert "the engine" in error["message"]
    assert "secret" not in answer.text
    assert int(answer.headers["retry-after"]) >= 1
