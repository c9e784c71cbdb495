"""The whole way: a sentence and eight pairs to a real server with the real base and generator."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex_generation.zoo.tasks import Example, Task
from tests.support.server_process import server_process

pytestmark = pytest.mark.slow

N_UNSEEN = 24
TASK = Task.parse("surname/plain")


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def reply(self, adapter: str, prompt: str) -> tuple[str, str]:
        """The answer, and the digest that gave it."""
        body = {
            "model": adapter,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 16,
        }
        answer = self.http.post("/v1/chat/completions", json=body).raise_for_status().json()
        return answer["choices"][0]["message"]["content"], answer["adapter"]["digest"]

    def n_exact(self, adapter: str, examples: list[Example]) -> int:
        return sum(self.reply(adapter, each.prompt)[0] == each.answer for each in examples)

    def job(self, id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.http.get(f"/v1/jobs/{id}").json()
        return job


def test_a_surname_is_learnt_from_eight_pairs_beside_serving(
    pulled_base: Path, pulled_encoder: Path, tmp_path: Path
) -> None:
    """From the sentence alone nothing is right; the answer under the name changes once."""
    unseen = list(TASK.examples("validation", N_UNSEEN))
    pairs = [{"prompt": each.prompt, "answer": each.answer} for each in TASK.examples("train", 8)]
    order = {
        "description": TASK.test_descriptions()[0],
        "examples": pairs,
        "name": "surname",
        "force": True,  # a draft, even if the sentence is strange
        "budget_s": 500,
        "probe": False,
    }
    with (
        server_process(pulled_base, tmp_path, "--dtype", "bfloat16") as server,
        httpx.Client(base_url=server.url, timeout=600) as http,
    ):
        client = Client(http)
        ordered = client.http.post("/v1/adapters/generate", json=order)
        assert ordered.status_code == 202, ordered.text
        job = ordered.json()
        digests = [client.reply("surname", unseen[0].prompt)[1]]
        ended = threading.Event()

        def ask_on() -> None:
            while not ended.is_set():
                digests.append(client.reply("surname", unseen[0].prompt)[1])

        asking = threading.Thread(target=ask_on)
        asking.start()
        try:
            events = client.http.get(f"/v1/jobs/{job['id']}/events").text
        finally:
            ended.set()
            asking.join()
        assert '"serves":"learnt"' in events, events[-2000:]
        digests.append(client.reply("surname", unseen[0].prompt)[1])
        changes = sum(a != b for a, b in itertools.pairwise(digests))
        assert (digests[0], changes) == (job["digest"], 1)
        before = client.n_exact(f"surname@{job['digest']}", unseen)
        after = client.n_exact("surname", unseen)
        assert client.job(job["id"])["digest"] == digests[-1]
    assert before <= 0.1 * N_UNSEEN
    assert after >= 0.5 * N_UNSEEN
