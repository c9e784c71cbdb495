"""What the cluster answers is what one process answers, bit for bit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import ADMIN
from tests.support.cluster_process import ClusterProcess
from tests.support.server_process import ServerProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = [None, *(f"a{number}" for number in range(16))]


def body_of(adapter: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "adapter": adapter,
        "messages": [{"role": "user", "content": f"the server keeps {adapter or 'one base'}"}],
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
        **changes,
    }


def answers(url: str, bodies: list[dict[str, Any]]) -> list[Any]:
    """Eight at once, in order; what differs from call to call is left out."""

    def ask(body: dict[str, Any]) -> Any:
        answer = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
        return answer["choices"], answer["usage"], answer.get("adapter")

    with httpx.Client(timeout=600, headers=ADMIN) as client, ThreadPoolExecutor(8) as threads:
        return list(threads.map(ask, bodies))


def test_sixteen_adapters_and_the_base_answer_as_in_one_process(
    cluster: ClusterProcess, single: ServerProcess
) -> None:
    bodies = [body_of(name) for name in NAMES]
    ours, theirs = answers(cluster.url, bodies), answers(single.url, bodies)
    for name, one, other in zip(NAMES, ours, theirs, strict=True):
        assert one[0] == other[0], name
        assert one[2] == other[2]
    assert len({json.dumps(choices) for choices, _, _ in ours}) == len(NAMES)  # each does something


def test_a_sampled_answer_with_a_seed_is_the_same(
    cluster: ClusterProcess, single: ServerProcess
) -> None:
    bodies = [body_of(f"a{n}", temperature=1.5, seed=n, n=3) for n in range(4)]
    assert [a[0] for a in answers(cluster.url, bodies)] == [
        a[0] for a in answers(single.url, bodies)
    ]


def test_mixtures_grammars_and_own_revisions_are_the_same(
    cluster: ClusterProcess, single: ServerProcess
) -> None:
    mixture = [{"name": "a1", "weight": 0.7}, {"name": "a2", "weight": 0.3}]
    bodies = [
        body_of(None) | {"adapter": mixture},
        body_of("a3", response_format={"type": "json_object"}),
        body_of("a4", tool_choice="none"),
    ]
    ours, theirs = answers(cluster.url, bodies), answers(single.url, bodies)
    assert [a[0] for a in ours] == [a[0] for a in theirs]
    assert [a[2] for a in ours] == [a[2] for a in theirs]


def test_vectors_are_the_same(cluster: ClusterProcess, single: ServerProcess) -> None:
    def vectors(url: str) -> Any:
        body = {"model": "a5", "input": ["one base", "many adapters"]}
        return httpx.post(f"{url}/v1/embeddings", json=body, timeout=600, headers=ADMIN).json()[
            "data"
        ]

    assert vectors(cluster.url) == vectors(single.url)


def test_a_stream_has_the_same_text_and_one_end(
    cluster: ClusterProcess, single: ServerProcess
) -> None:
    def streamed(url: str) -> tuple[str, list[str]]:
        text, others = "", []
        body = body_of("a6", stream=True, logprobs=False, top_logprobs=None, max_tokens=60)
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=600, headers=ADMIN
        ) as answer:
            assert answer.status_code == 200
            for line in filter(None, answer.read().decode().split("\n")):
                if line == "data: [DONE]":
                    others.append(line)
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content") or ""
        return text, others

    ours, theirs = streamed(cluster.url), streamed(single.url)
    assert ours == theirs
    assert ours[1] == ["data: [DONE]"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (body_of("nobody"), 404, "adapter_not_found"),
        (body_of("a1") | {"messages": [{"role": "user", "content": "many " * 9000}]}, 400,
         "context_length_exceeded"),
        (body_of("a1", response_format={"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "object", "not": {}}}}), 400, "invalid_grammar"),
    ],
)  # fmt: skip
def test_errors_have_the_same_status_and_code(
    cluster: ClusterProcess, single: ServerProcess, body: dict[str, Any], status: int, code: str
) -> None:
    found = []
    for url in (cluster.url, single.url):
        for stream in (False, True):
            sent = body | {"stream": stream}
            answer = httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=600, headers=ADMIN)
            found.append((answer.status_code, answer.json()["error"]["code"]))
    assert set(found) == {(status, code)}
