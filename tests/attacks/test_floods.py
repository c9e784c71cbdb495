"""Floods of one key while another key asks for single tokens, on a real server process.

The wait is counted in steps of the engine, as ``/metrics`` shows it, so that a slow machine changes
nothing.
"""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
N_ADAPTERS = 6
N_SMALL = 8
FLOOD, SMALL, ROOT = "flood-secret", "small-secret", "root-secret"


def _key(name: str, secret: str, scope: str = "infer", more: str = "") -> str:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscope = "{scope}"\n{more}\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("flooded")
    keys = folder / "keys.toml"
    keys.write_text(
        _key("flood", FLOOD, more="max_queued = 40")
        + _key("small", SMALL)
        + _key("root", ROOT, "admin", "operator = true")
    )
    spec = BaseSpec.of(tiny_model(), "model")
    modules = []
    for number in range(N_ADAPTERS):
        write_lora(folder / f"a{number}", spec, seed=number)
        modules += ["--lora-modules", f"a{number}={folder / f'a{number}'}"]
    flags = ["--keys", keys, "--max-batch-size", "4", "--max-loras", "8", *modules]
    with server_process(save_tiny_model(folder / "model"), folder / "state", *flags) as running:
        yield running


def _complete(server: ServerProcess, secret: str, **body: object) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions",
        json={"ignore_eos": True, "return_token_ids": True, **body},
        headers={"authorization": f"Bearer {secret}"},
        timeout=300,
    )


def _sample(server: ServerProcess, name: str, **labels: str) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {ROOT}"}).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return 0.0


def _flood_body(number: int) -> dict[str, object]:
    return {
        "prompt": f"flood {number}",
        "max_tokens": 150,
        "adapter": f"a{number % N_ADAPTERS}",
        "temperature": 1.0,
        "seed": number,
        "n": 2,
    }


def test_a_flood_over_many_adapters_costs_another_key_a_bounded_wait(
    server: ServerProcess,
) -> None:
    """The answers of the flood, whose rows are taken back, are those of an idle server."""
    n_calls = 12
    alone = [_complete(server, ROOT, **_flood_body(number)).json() for number in range(n_calls)]
    _complete(server, SMALL, prompt="warm", max_tokens=1)
    small_before = _sample(server, "loraplex_tenant_queue_steps_sum", tenant="small")
    with ThreadPoolExecutor(n_calls) as pool:
        flood = [
            pool.submit(_complete, server, FLOOD, **_flood_body(number))
            for number in range(n_calls)
        ]
        poll = threading.Event()
        while _sample(server, "loraplex_tenant_requests", tenant="flood", state="waiting") < 4:
            assert not any(call.done() for call in flood)
            poll.wait(0.02)
        for number in range(N_SMALL):
            answer = _complete(server, SMALL, prompt=f"small {number}", max_tokens=1)
            assert answer.status_code == 200, answer.text
        assert not all(call.done() for call in flood)  # it went on meanwhile
        answers = [call.result() for call in flood]
    waited = _sample(server, "loraplex_tenant_queue_steps_sum", tenant="small") - small_before
    assert waited <= 2 * N_SMALL  # two tenants: two steps each
    assert _sample(server, "loraplex_rows_taken_back_total") > 0
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"]
        assert [one["token_ids"] for one in found] == [
            one["token_ids"] for one in expected["choices"]
        ]


def test_a_full_queue_of_one_key_is_not_that_of_another(server: ServerProcess) -> None:
    with ThreadPoolExecutor(4) as pool:
        body = {"prompt": "flood", "max_tokens": 150, "n": 20}
        calls = [pool.submit(_complete, server, FLOOD, **body) for _ in range(4)]
        small = _complete(server, SMALL, prompt="small", max_tokens=1)
        answers = [call.result() for call in calls]
    assert small.status_code == 200
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert len(refused) < 4
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert "max_queued" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
