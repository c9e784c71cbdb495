"""Requests that mean to take the time of others: stop strings, patterns, deletes that wait."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.attacks.conftest import STALL_S, bystander, cpu_s, stream
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
ENDLESS = r"(?:(.)|(..)|(...))*(?=\1\1\1)(?<=!)"  # three ways at each character, and none ends


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(), "model")


def upload(server: ServerProcess, name: str, folder: Path, **changes: object) -> httpx.Response:
    config = json.loads((folder / "adapter_config.json").read_text())
    files = {
        "config": json.dumps({**config, **changes}).encode(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    return httpx.put(f"{server.url}/v1/adapters/{name}", files=files, timeout=120)


@broken_only_if_each_time
def test_stop_strings_that_nearly_match_cost_no_more_than_none(server: ServerProcess) -> None:
    """Without an automaton each token compares 16 strings of 1,000 characters again."""
    token = httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).json()["tokens"][-1]
    body = {
        "prompt": "x",
        "n": 24,
        "max_tokens": 400,
        "ignore_eos": True,
        "logit_bias": {str(token): 100},
    }

    def cost_s(**more: object) -> float:
        before = cpu_s(server)
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, **more}, timeout=300)
        assert answer.status_code == 200, answer.text
        assert "aaaa" in answer.json()["choices"][0]["text"]
        return cpu_s(server) - before

    cost_s()  # the first time compiles and allocates
    plain_s = cost_s()
    almost = ["a" * (984 + n) + "b" for n in range(16)]
    with stream(server.url) as gaps:
        attacked_s = cost_s(stop=almost)
    check_below(attacked_s, 2 * plain_s + 1.0)  # the stream's own cost is in it
    check_below(max(gaps), STALL_S)


@broken_only_if_each_time
def test_a_pattern_without_end_is_refused_and_delays_nobody(
    server: ServerProcess, spec: BaseSpec, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "lora", spec)
    with bystander(server.url), stream(server.url) as gaps:
        answer = upload(server, "endless", folder, target_modules=ENDLESS)
    assert answer.status_code == 400
    assert "takes too long to match" in answer.text
    check_below(max(gaps), STALL_S)


@broken_only_if_each_time
def test_deletes_that_wait_for_streams_hold_nothing_that_others_need(
    server: ServerProcess, spec: BaseSpec, tmp_path: Path
) -> None:
    names = [f"held-{number}" for number in range(8)]
    for seed, name in enumerate(names):
        answer = upload(server, name, write_lora(tmp_path / name, spec, seed=seed))
        assert answer.status_code == 201, answer.text

    def delete(name: str) -> int:
        url = f"{server.url}/v1/adapters/{name}?timeout_s=30"
        return httpx.delete(url, timeout=120).status_code

    with contextlib.ExitStack() as streams, ThreadPoolExecutor(8) as pool:
        for name in names:
            streams.enter_context(stream(server.url, name))
        with bystander(server.url, "/v1/models") as models, stream(server.url) as gaps:
            deletes = [pool.submit(delete, name) for name in names]
            while models.n_answers < 50:  # each of them while deletes wait
                assert httpx.get(f"{server.url}/v1/adapters").status_code == 200
        streams.close()
        assert [each.result() for each in deletes] == [200] * 8
    check_below(max(gaps), STALL_S)
