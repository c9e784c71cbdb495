"""Two `loraplex serve` over one catalogue on an S3 server: what one is told, both serve."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import NamedTuple

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.object_stores import S3_SECRET, s3_environment, s3_server
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

ASKED = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


class Fleet(NamedTuple):
    a: ServerProcess
    b: ServerProcess
    model: Path
    adapters: tuple[Path, ...]  # PEFT directories, each another adapter
    folder: Path


FLAGS = ("--catalogue", "s3://adapters/fleet", "--catalogue-refresh", "0")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = save_tiny_model(folder / "tiny")
    spec = BaseSpec.of(tiny_model(eos_token_id=2), "tiny")
    adapters = tuple(write_lora(folder / str(seed), spec, seed=seed) for seed in range(4))
    with ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(running.enter_context(s3_server())).items():
            patch.setenv(name, value)
        a, b = (
            running.enter_context(server_process(model, folder / f"state-{name}", *FLAGS))
            for name in "ab"
        )
        yield Fleet(a, b, model, adapters, folder)


def upload(
    server: ServerProcess, name: str, folder: Path, headers: dict[str, str] | None = None
) -> httpx.Response:
    files = {
        part: (file, (folder / file).read_bytes())
        for part, file in (
            ("config", "adapter_config.json"),
            ("weights", "adapter_model.safetensors"),
        )
    }
    return httpx.put(f"{server.url}/v1/adapters/{name}", files=files, headers=headers, timeout=120)


def ask(server: ServerProcess, adapter: str | None) -> httpx.Response:
    body = ASKED if adapter is None else {**ASKED, "adapter": adapter}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def text(server: ServerProcess, adapter: str | None) -> str:
    answer = ask(server, adapter)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_what_one_server_is_given_both_serve_list_and_forget(fleet: Fleet) -> None:
    put = upload(fleet.a, "shared", fleet.adapters[0])
    assert put.status_code == 201, put.text
    digest = put.json()["digest"]
    answer = ask(fleet.b, "shared")
    assert answer.headers["x-loraplex-adapter"] == f"shared@{digest[:12]}"
    assert text(fleet.a, "shared") == text(fleet.b, "shared") != text(fleet.b, None)
    for server in (fleet.a, fleet.b):
        listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        assert "shared" in [model["id"] for model in listed]
        card = httpx.get(f"{server.url}/v1/adapters/shared", timeout=60)
        assert card.headers["etag"] == f'"{digest}"'
    gone = httpx.delete(f"{fleet.a.url}/v1/adapters/shared", timeout=60)
    assert gone.status_code == 200
    for server in (fleet.b, fleet.a):
        assert ask(server, "shared").status_code == 404
        assert httpx.get(f"{server.url}/v1/adapters/shared", timeout=60).status_code == 404


def test_a_stream_keeps_its_digest_while_another_server_replaces_the_adapter(fleet: Fleet) -> None:
    first = upload(fleet.a, "moving", fleet.adapters[0]).json()["digest"]
    alone = text(fleet.b, "moving")
    body = {**ASKED, "max_tokens": 3000, "stream": True, "adapter": "moving"}
    with httpx.stream("POST", f"{fleet.b.url}/v1/completions", json=body, timeout=120) as stream:
        assert stream.headers["x-loraplex-adapter"] == f"moving@{first[:12]}"
        lines = stream.iter_lines()
        told = [next(line for line in lines if line.startswith("data: "))]
        second = upload(fleet.a, "moving", fleet.adapters[1]).json()["digest"]
        assert ask(fleet.b, "moving").headers["x-loraplex-adapter"] == f"moving@{second[:12]}"
        told += [line for line in lines if line.startswith("data: ")]
    assert told[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in told[:-1]]
    streamed = "".join(choice["text"] for event in events for choice in event["choices"])
    assert streamed.startswith(alone)
    assert not text(fleet.b, "moving").startswith(streamed[:12])
    kept = ask(fleet.b, f"moving@{first[:12]}")
    assert kept.json()["choices"][0]["text"] == alone
    rolled = httpx.post(f"{fleet.b.url}/v1/adapters/moving/rollback", json={}, timeout=60)
    assert rolled.json()["digest"] == first
    assert text(fleet.a, "moving") == alone


def test_of_two_uploads_with_if_match_to_two_servers_exactly_one_is_taken(fleet: Fleet) -> None:
    digest = upload(fleet.a, "raced", fleet.adapters[0]).json()["digest"]
    start = Barrier(2)

    def change(server: ServerProcess, folder: Path) -> httpx.Response:
        start.wait()
        return upload(server, "raced", folder, {"if-match": f'"{digest}"'})

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(change, (fleet.a, fleet.b), fleet.adapters[1:3]))
    assert sorted(answer.status_code for answer in answers) == [200, 412]
    (taken,) = [answer.json()["digest"] for answer in answers if answer.status_code == 200]
    for server in (fleet.a, fleet.b):
        assert ask(server, "raced").headers["x-loraplex-adapter"] == f"raced@{taken[:12]}"


def test_pins_and_cards_reach_the_other_server(fleet: Fleet) -> None:
    upload(fleet.a, "pinned", fleet.adapters[3])
    assert httpx.post(f"{fleet.a.url}/v1/adapters/pinned/pin", timeout=60).status_code == 200
    edited = {"description": "seen by all"}
    patched = httpx.patch(f"{fleet.b.url}/v1/adapters/pinned", json=edited, timeout=60)
    assert patched.status_code == 200, patched.text
    for server in (fleet.a, fleet.b):
        card = httpx.get(f"{server.url}/v1/adapters/pinned", timeout=60).json()
        assert (card["pinned"], card["description"]) == (True, "seen by all")


@pytest.mark.slow
def test_a_start_with_a_catalogue_loses_no_adapter_of_before(fleet: Fleet) -> None:
    state = fleet.folder / "state-of-its-own"
    with server_process(fleet.model, state) as alone:
        upload(alone, "mine", fleet.adapters[0])
        before = text(alone, "mine")
    with server_process(fleet.model, state, *FLAGS) as sharing:
        assert ask(sharing, "mine").status_code == 404
    with server_process(fleet.model, state) as alone:
        assert text(alone, "mine") == before


@pytest.mark.slow
def test_a_server_that_was_away_serves_the_newest_digest_and_no_log_has_a_secret(
    fleet: Fleet,
) -> None:
    state = fleet.folder / "state-away"
    upload(fleet.a, "newest", fleet.adapters[0])
    with server_process(fleet.model, state, *FLAGS) as away:
        text(away, "newest")
        away.signal(signal.SIGKILL)
        away.wait()
    digest = upload(fleet.b, "newest", fleet.adapters[2]).json()["digest"]
    with server_process(fleet.model, state, *FLAGS) as back:
        answer = ask(back, "newest")
        assert answer.headers["x-loraplex-adapter"] == f"newest@{digest[:12]}"
        assert text(back, "newest") == text(fleet.b, "newest")
        assert S3_SECRET not in back.log
    assert S3_SECRET not in fleet.a.log + fleet.b.log
