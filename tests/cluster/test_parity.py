"""What the cluster answers is what one process answers, bit for bit."""

import json
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import ADMIN, GREEDY, MODEST
from tests.cluster.whole_answers import answers, body_of
from tests.support.servers.cluster_process import ClusterProcess
from tests.support.servers.server_process import ServerProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


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


def test_a_large_file_goes_through_the_gateways_in_pieces_and_comes_back_whole(
    cluster: ClusterProcess,
) -> None:
    """More than a gateway takes at once, in a body that the client sends in chunks."""
    call = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * 100_000}}
    lines = (json.dumps({"custom_id": str(n), **call}) + "\n" for n in range(120))
    content = "".join(lines).encode()
    form = httpx.Request("POST", "http://x", files={"file": content}, data={"purpose": "batch"})
    body = form.read()
    with httpx.Client(base_url=cluster.url, headers=MODEST, timeout=120) as client:
        stored = client.post(
            "/v1/files",
            content=(body[at : at + 100_000] for at in range(0, len(body), 100_000)),
            headers={"content-type": form.headers["content-type"]},
        )
        assert stored.status_code == 200, stored.text
        assert stored.json()["bytes"] == len(content)
        path = f"/v1/files/{stored.json()['id']}"
        with client.stream("GET", f"{path}/content") as answer:
            assert b"".join(answer.iter_bytes()) == content
        assert httpx.get(f"{cluster.url}{path}", headers=GREEDY).status_code == 404
        assert client.delete(path).status_code == 200
