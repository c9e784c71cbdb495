"""The whole way: sentences and pairs to a real server with the real base."""

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers.server_process import server_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a machine with other work

BUDGET_S = 120
TASK = "Which team handles this message of a customer: billing, shipping or account?"
SEEN = [
    ("Why was I charged twice this month?", "billing"),
    ("My parcel still shows as not dispatched.", "shipping"),
    ("I forgot my password again.", "account"),
    ("Please send me the invoice for March.", "billing"),
    ("Can you deliver to my office instead?", "shipping"),
    ("How do I change the email I log in with?", "account"),
    ("The refund has not reached my card.", "billing"),
    ("The courier left the box at a neighbour's.", "shipping"),
    ("Delete my profile, please.", "account"),
    ("Is there a fee for paying by cheque?", "billing"),
    ("Where is my order? It should be here by now.", "shipping"),
    ("I cannot sign in on my new phone.", "account"),
    ("The discount was missing on my bill.", "billing"),
    ("The package arrived crushed.", "shipping"),
    ("Someone else seems to use my login.", "account"),
    ("Can I pay in three instalments?", "billing"),
]
UNSEEN = [
    ("You took the money from my card too early.", "billing"),
    ("The tracking number does not work.", "shipping"),
    ("My login is locked after three tries.", "account"),
    ("I need a receipt for my tax office.", "billing"),
    ("When will the parcel be delivered?", "shipping"),
    ("I want a different user name.", "account"),
    ("The price on the bill is wrong.", "billing"),
    ("The driver could not find my address.", "shipping"),
    ("How can I reset my password?", "account"),
    ("Why does the invoice list a fee?", "billing"),
    ("The box was empty when it arrived.", "shipping"),
    ("Please close my account.", "account"),
]


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

    def n_exact(self, adapter: str | dict[str, Any], examples: Sequence[tuple[str, str]]) -> int:
        with ThreadPoolExecutor(8) as at_once:
            replies = at_once.map(lambda each: self.reply(adapter, each[0])[0], examples)
            return sum(map(str.__eq__, replies, (answer for _, answer in examples)))

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        with self.http.stream("GET", f"/v1/jobs/{job}/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


@pytest.fixture(scope="module")
def client(
    pulled_base: Path, pulled_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    state = tmp_path_factory.mktemp("state")
    flags = ("--dtype", "bfloat16", "--adapter-memory", "64MiB", "--kv-memory", "64MiB")
    with (
        server_process(pulled_base, state, *flags) as server,
        httpx.Client(base_url=server.url, timeout=300) as http,
    ):
        yield Client(http)


def test_a_sentence_alone_is_answered_by_the_adapter_that_follows_descriptions(
    client: Client,
) -> None:
    body = {
        "adapter": {"description": TASK},
        "messages": [{"role": "user", "content": UNSEEN[0][0]}],
        "temperature": 0,
        "max_tokens": 16,
    }
    got = client.http.post("/v1/chat/completions", json=body)
    assert got.status_code == 200, got.text
    answer = got.json()
    name = answer["adapter"]["name"]
    assert answer["adapter"]["chosen_by"]["method"] == "multi-task"
    card = client.http.get(f"/v1/adapters/{name}").raise_for_status().json()
    assert card["defaults"]["system_prompt"] == TASK
    named = {**body, "adapter": name}  # the same prompt and weights
    again = client.http.post("/v1/chat/completions", json=named).raise_for_status().json()
    assert again["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]


def test_pairs_are_turns_of_that_adapter_until_one_has_learnt_from_them(client: Client) -> None:
    pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in SEEN]
    question = {"role": "user", "content": UNSEEN[0][0]}
    common = {"temperature": 0, "max_tokens": 16}
    asked = {"adapter": {"description": TASK, "examples": pairs}, "messages": [question]}
    answer = client.http.post("/v1/chat/completions", json={**asked, **common}).json()
    chosen = answer["adapter"]["chosen_by"]
    assert (chosen["serves"], chosen["turns"], chosen["method"]) == ("turns", 8, "multi-task")
    client.http.post(f"/v1/jobs/{chosen['job']}/cancel").raise_for_status()
    said = [{"role": "system", "content": TASK}]
    for prompt, reply in SEEN[:8]:
        said.append({"role": "user", "content": prompt})
        said.append({"role": "assistant", "content": reply})
    named = {"adapter": answer["adapter"]["name"], "messages": [*said, question]}
    same = client.http.post("/v1/chat/completions", json={**named, **common}).json()
    assert same["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert same["choices"][0]["message"] == answer["choices"][0]["message"]


@pytest.mark.nightly
def test_sixteen_pairs_are_answered_by_turns_at_once_and_soon_by_an_adapter_that_is_better(
    client: Client,
) -> None:
    pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in SEEN]
    asked = {"description": TASK, "examples": pairs}
    turns = client.n_exact(asked, UNSEEN[:1])
    assert turns <= 1  # whatever it is, it is answered
    order = {**asked, "name": "team", "budget_s": BUDGET_S, "probe": False}
    ordered = client.http.post("/v1/adapters/generate", json=order)
    assert ordered.status_code == 202, ordered.text
    job = ordered.json()
    digests, states = [], []
    for state in client.events(job["id"]):
        states.append(state)
        # A token tells; learning has but a tenth of the time that answers take.
        digests.append(client.reply("team", UNSEEN[0][0], max_tokens=1)[1])
    assert states[-1]["status"] == "succeeded", states[-1]
    assert states[-1]["learning"]["serves"] == "learnt", states[-1]
    assert states[-1]["digest"] == digests[-1]
    assert sum(a != b for a, b in itertools.pairwise(digests)) <= 1
    held_out = client.http.get("/v1/adapters/team").json()["provenance"]["refinement"]["held_out"]
    assert held_out["after"]["nll"] < held_out["base"]["nll"]
    assert client.n_exact("team", UNSEEN) >= 0.6 * len(UNSEEN)
