"""The whole way: sentences and pairs to a real server with the real base and generator."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Example, Task
from tests.support.server_process import server_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a machine with other work

N_UNSEEN = 24
BUDGET_S = 240
TASK = Task.parse("list-etc/plain")


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def reply(
        self, adapter: str | dict[str, Any], prompt: str, *, max_tokens: int = 16
    ) -> tuple[str, str]:
        """The answer, and the digest that gave it."""
        body = {
            "adapter": adapter,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        answer = self.http.post("/v1/chat/completions", json=body).raise_for_status().json()
        return answer["choices"][0]["message"]["content"], answer["adapter"]["digest"]

    def n_exact(self, adapter: str | dict[str, Any], examples: list[Example]) -> int:
        with ThreadPoolExecutor(8) as at_once:
            replies = at_once.map(lambda each: self.reply(adapter, each.prompt)[0], examples)
            return sum(map(str.__eq__, replies, (each.answer for each in examples)))

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        with self.http.stream("GET", f"/v1/jobs/{job}/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


def _order(name: str, task: Task, *, n_pairs: int) -> dict[str, Any]:
    pairs = task.examples("train", n_pairs)
    return {
        "description": task.test_descriptions()[0],
        "examples": [{"prompt": each.prompt, "answer": each.answer} for each in pairs],
        "name": name,
        "budget_s": BUDGET_S,
        "probe": False,
    }


@pytest.fixture(scope="module")
def client(
    pulled_base: Path, pulled_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    state = tmp_path_factory.mktemp("state")
    with (
        server_process(pulled_base, state, "--dtype", "bfloat16") as server,
        httpx.Client(base_url=server.url, timeout=300) as http,
    ):
        yield Client(http)


@pytest.mark.parametrize("name", ["word-at-1/json", "file-ending/json", "which-language/quotes"])
def test_a_combination_that_nobody_trained_is_answered_from_the_sentence_alone(
    client: Client, name: str
) -> None:
    task = Task.parse(name)
    assert name in load_split("wide").sets["validation"]
    asked = {"description": task.test_descriptions()[0]}
    unseen = list(task.examples("validation", N_UNSEEN))
    assert client.n_exact(asked, unseen) >= 0.7 * N_UNSEEN


def test_a_draft_that_has_every_pair_right_is_kept_and_its_job_ends_at_once(
    client: Client,
) -> None:
    task = Task.parse("file-ending/json")
    order = _order("endings", task, n_pairs=4)
    job = client.http.post("/v1/adapters/generate", json=order).raise_for_status().json()
    *_, last = client.events(job["id"])
    assert (last["status"], last["learning"]["serves"]) == ("succeeded", "draft"), last
    card = client.http.get("/v1/adapters/endings").raise_for_status().json()
    learnt = card["provenance"]["refinement"]
    assert (learnt["start"], learnt["start_is_right"], learnt["steps"]) == ("draft", True, 0)
    in_a_chat = {key: order[key] for key in ("description", "examples")} | {"wait": True}
    (unseen,) = task.examples("validation", 1)
    body = {
        "adapter": in_a_chat,
        "messages": [{"role": "user", "content": unseen.prompt}],
        "temperature": 0,
        "max_tokens": 16,
    }
    answer = client.http.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"] == unseen.answer
    assert answer["adapter"]["chosen_by"]["serves"] == "draft"


def test_pairs_find_the_right_reading_of_a_sentence_without_any_training(client: Client) -> None:
    """Nobody trained surnames; that the middle of two names is one, the pairs say."""
    task = Task.parse("surname/plain")
    unseen = list(task.examples("validation", N_UNSEEN))
    order = {**_order("surname", task, n_pairs=8), "wait": True}
    card = client.http.post("/v1/adapters/generate", json=order).raise_for_status().json()
    learnt = card["provenance"]["refinement"]
    assert (learnt["start_is_right"], learnt["gained"], learnt["steps"]) == (True, True, 0)
    assert card["provenance"]["parts"][learnt["start"]] == 1.0
    assert learnt["held_out"]["before"]["exact"] == 0
    alone = {"description": order["description"], "name": "alone", "force": True, "probe": False}
    client.http.post("/v1/adapters/generate", json=alone).raise_for_status()
    assert client.n_exact("alone", unseen) <= 0.1 * N_UNSEEN
    assert client.n_exact("surname", unseen) >= 0.7 * N_UNSEEN


def test_an_operation_is_learnt_from_eight_pairs_beside_serving(client: Client) -> None:
    """From the sentence alone nothing is right; the answer under the name changes once."""
    unseen = list(TASK.examples("validation", N_UNSEEN))
    order = _order("etc", TASK, n_pairs=8)
    ordered = client.http.post("/v1/adapters/generate", json=order)
    assert ordered.status_code == 202, ordered.text
    job = ordered.json()
    digests = []
    states = []
    for state in client.events(job["id"]):
        states.append(state)
        # A token tells; learning has but a tenth of the time that answers take.
        digests.append(client.reply("etc", unseen[0].prompt, max_tokens=1)[1])
    assert states[-1]["learning"]["serves"] == "learnt", states[-1]
    assert states[-1]["digest"] == digests[-1]
    assert digests[0] == job["digest"]
    assert sum(a != b for a, b in itertools.pairwise(digests)) == 1
    before = client.n_exact(f"etc@{job['digest'][:12]}", unseen)
    after = client.n_exact("etc", unseen)
    assert before <= 0.1 * N_UNSEEN
    assert after >= 0.5 * N_UNSEEN
