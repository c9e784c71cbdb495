"""Chat templates of adapters that mean to take the server's time or memory."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.attacks.conftest import STALL_S, bystander, children_cpu_s, memory_bytes, stream
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
GOOD = "good {{ messages[0].content }}"


def put(server: ServerProcess, folder: Path, name: str, template: str) -> None:
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
        "chat_template": template.encode(),
    }
    answer = httpx.put(f"{server.url}/v1/adapters/{name}", files=files, timeout=120)
    assert answer.status_code in {200, 201}, answer.text


def chat(server: ServerProcess, name: str) -> httpx.Response:
    body = {
        "adapter": name,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 1,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
NUMBERS = itertools.count()  # a template that was stopped is refused without a try
ONE_RENDER_S = 4.0  # two seconds of CPU at most, the start of a process, and what it shares


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates") / "lora"
    return write_lora(folder, BaseSpec.of(tiny_model(), "model"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, "took "),
        ("{{ 'a' * 10000000000 }}", "needs too much memory"),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
            "{% endfor %}",
            "needs too much memory",
        ),
        ("{{ 'a' * 30000000 }}", "longer than"),
        ("{{ 'a' * 3000000 }}", "prompt is too long"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deep"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if %}", "Expected an expression"),
    ],
    ids=[
        *("endless", "memory", "doubling", "output", "context", "recursion", "error", "escape"),
        *("include", "syntax"),
    ],
)
@broken_only_if_each_time
def test_a_hostile_template_fails_alone(
    server: ServerProcess, folder: Path, template: str, reason: str
) -> None:
    put(server, folder, "hostile", f"{template}{{# {next(NUMBERS)} #}}")
    put(server, folder, "polite", GOOD)
    before = memory_bytes(server)
    with bystander(server.url), stream(server.url) as gaps:
        answer = chat(server, "hostile")
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] in {"chat_template_error", "context_length_exceeded"}
        assert reason in answer.json()["error"]["message"]
        answer = chat(server, "polite")
        assert answer.status_code == 200, answer.text
    check_below(max(gaps), STALL_S)
    assert memory_bytes(server) - before < 200 << 20


@broken_only_if_each_time
def test_a_flood_of_a_template_that_was_stopped_costs_one_process(
    server: ServerProcess, folder: Path
) -> None:
    put(server, folder, "hostile", f"{ENDLESS}{{# {next(NUMBERS)} #}}")
    put(server, folder, "polite", GOOD)
    before = children_cpu_s(server)
    with bystander(server.url), stream(server.url) as gaps, ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda _: chat(server, "hostile"), range(24)))
        assert chat(server, "polite").status_code == 200
    refused = [answer for answer in answers if answer.status_code == 400]
    # Where the machine has no processor free, the others give up before the first is stopped.
    gave_up = [answer for answer in answers if answer not in refused]
    assert {answer.json()["error"]["code"] for answer in gave_up} <= {"templates_busy"}
    messages = {answer.json()["error"]["message"] for answer in refused}
    assert 1 <= len(messages) <= 2, messages  # of the first try, and of the refusal afterwards
    assert all(": took " in message for message in messages)
    check_below(children_cpu_s(server) - before, ONE_RENDER_S)
    check_below(max(gaps), STALL_S)


def test_chats_of_other_adapters_render_once_an_endless_one_is_stopped(
    server: ServerProcess, folder: Path
) -> None:
    put(server, folder, "hostile", f"{ENDLESS}{{# {next(NUMBERS)} #}}")
    put(server, folder, "polite", GOOD)
    with ThreadPoolExecutor(8) as threads:
        hostile = threads.submit(chat, server, "hostile")
        polite = list(threads.map(lambda _: chat(server, "polite"), range(40)))
        assert hostile.result().status_code == 400
    gave_up = [answer for answer in polite if answer.status_code != 200]
    # Where the machine has no processor free, they give up before it is stopped.
    assert {answer.json()["error"]["code"] for answer in gave_up} <= {"templates_busy"}
    assert chat(server, "polite").status_code == 200
