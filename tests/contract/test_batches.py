"""Files and batches through the official openai client, against a real server process."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

KEY = "key-of-the-batches"
ADAPTER = "one"
CHAT = "/v1/chat/completions"


def _serve(folder: Path) -> Any:
    flags = ("--api-key", KEY, "--adapters-dir", folder / "adapters")
    return server_process(folder / "tiny", folder / "state", *flags)


def _prepare(folder: Path) -> Path:
    save_tiny_model(folder / "tiny")
    spec = BaseSpec.of(tiny_model(), "tiny")
    write_lora(folder / "adapters" / ADAPTER, spec, rank=2, seed=1, scale=0.4)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with _serve(_prepare(tmp_path_factory.mktemp("batches"))) as server:
        yield server


def _client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with _client(server) as client:
        yield client


def _chat(number: int, **fields: object) -> dict[str, object]:
    message = {"role": "user", "content": f"Count to {number}"}
    return {"model": "tiny", "messages": [message], "max_tokens": 8, "temperature": 0, **fields}


def _jsonl(url: str, bodies: list[dict[str, object]]) -> bytes:
    lines = [
        {"custom_id": f"call-{n}", "method": "POST", "url": url, "body": body}
        for n, body in enumerate(bodies)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def _start(client: OpenAI, url: Any, bodies: list[dict[str, object]]) -> Batch:
    file = client.files.create(file=("calls.jsonl", _jsonl(url, bodies)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"of": "a test"}
    )


def _ended(client: OpenAI, batch_id: str) -> Batch:
    """The server answers when it has ended; the number of tries is for a machine that is busy."""
    for _ in range(6):
        batch = client.batches.retrieve(batch_id, extra_query={"timeout_s": 60})
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
    raise AssertionError(batch)


def _lines(client: OpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def _text(line: Any) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def test_a_batch_answers_as_the_same_calls_do(client: OpenAI) -> None:
    bodies = [_chat(n, **({"adapter": ADAPTER} if n % 2 else {})) for n in range(12)]
    batch = _start(client, CHAT, bodies)
    assert batch.metadata == {"of": "a test"}
    ended = _ended(client, batch.id)
    assert ended.status == "completed"
    assert ended.error_file_id is None
    assert ended.request_counts is not None
    counts = ended.request_counts
    assert (counts.total, counts.completed, counts.failed) == (12, 12, 0)
    lines = _lines(client, ended.output_file_id)
    assert [line["custom_id"] for line in lines] == [f"call-{n}" for n in range(12)]
    post = client.chat.completions.create
    alone = [
        post(
            model="tiny",
            messages=body["messages"],  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            extra_body={"adapter": body.get("adapter")},
        )
        for body in bodies
    ]
    assert [_text(line) for line in lines] == [a.choices[0].message.content for a in alone]
    assert len({_text(line) for line in lines}) > 1
    for line, body in zip(lines, bodies, strict=True):
        told = line["response"]["body"]["adapter"]
        assert (told and told["name"]) == body.get("adapter")


def test_embeddings_come_in_batches_too(client: OpenAI) -> None:
    texts = ["a", "b and c"]
    batch = _start(client, "/v1/embeddings", [{"model": "tiny", "input": t} for t in texts])
    lines = _lines(client, _ended(client, batch.id).output_file_id)
    alone = [
        client.embeddings.create(model="tiny", input=t, encoding_format="float") for t in texts
    ]
    assert [line["response"]["body"]["data"][0]["embedding"] for line in lines] == [
        a.data[0].embedding for a in alone
    ]


def test_calls_that_are_refused_are_in_the_error_file(client: OpenAI) -> None:
    bodies = [_chat(1), _chat(2, adapter="nobody"), _chat(3, max_tokens=-1)]
    ended = _ended(client, _start(client, CHAT, bodies).id)
    assert ended.status == "completed"
    assert [line["custom_id"] for line in _lines(client, ended.output_file_id)] == ["call-0"]
    failed = _lines(client, ended.error_file_id)
    assert [(line["custom_id"], line["response"]["status_code"]) for line in failed] == [
        ("call-1", 404),
        ("call-2", 400),
    ]
    assert failed[0]["response"]["body"]["error"]["code"] == "adapter_not_found"


def test_a_batch_is_cancelled_and_keeps_what_it_has(client: OpenAI) -> None:
    bodies = [_chat(0)] + [_chat(n, max_tokens=3000, ignore_eos=True) for n in range(60)]
    batch = _start(client, CHAT, bodies)
    with pytest.raises(openai.ConflictError, match="cancel it first"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    ended = _ended(client, batch.id)
    assert ended.status == "cancelled"
    assert ended.request_counts is not None
    assert ended.request_counts.completed < 61
    n_kept = len(_lines(client, ended.output_file_id)) if ended.output_file_id else 0
    assert n_kept == ended.request_counts.completed
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.batches.cancel(batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_files_and_batches_are_listed_page_by_page(client: OpenAI) -> None:
    batches = [_start(client, CHAT, [_chat(1)]) for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]  # turns pages by itself
    assert listed[:3] == [batch.id for batch in reversed(batches)]
    assert len(set(listed)) == len(listed)
    files = [file.id for file in client.files.list(purpose="batch", limit=2, order="asc")]
    assert files[-3:] == [batch.input_file_id for batch in batches]
    shown = client.files.retrieve(files[-1])
    assert (shown.filename, shown.purpose) == ("calls.jsonl", "batch")
    assert client.files.content(files[-1]).content == _jsonl(CHAT, [_chat(1)])


@pytest.mark.slow
def test_after_a_kill_every_line_is_answered_exactly_once(tmp_path: Path) -> None:
    folder = _prepare(tmp_path)
    bodies = [_chat(n, max_tokens=200, ignore_eos=True) for n in range(80)]
    with _serve(folder) as server, _client(server) as client:
        batch = _start(client, CHAT, bodies)
        n_done = 0
        while n_done < 10:  # each look waits on the server
            batch = client.batches.retrieve(batch.id, extra_query={"timeout_s": 0.05})
            assert batch.request_counts is not None
            n_done = batch.request_counts.completed
        server.signal(signal.SIGKILL)
        server.wait()
    assert n_done < len(bodies), "it ended before it could be killed"
    with _serve(folder) as server, _client(server) as client:
        ended = _ended(client, batch.id)
        assert ended.status == "completed"
        lines = _lines(client, ended.output_file_id)
        assert [line["custom_id"] for line in lines] == [f"call-{n}" for n in range(80)]
        message = bodies[70]["messages"]
        alone = client.chat.completions.create(
            model="tiny",
            messages=message,  # type: ignore[arg-type]
            max_tokens=200,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert _text(lines[70]) == alone.choices[0].message.content
