"""The default base on a cluster: its demos, and what is trained and learnt there."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex_server.model.loading.pull import loraplex_home
from tests.cluster.streams import CHAT
from tests.server.api.adapters.test_training import PAIRS, TRAIN, files_of, greedy
from tests.support.servers.cluster_process import ClusterProcess, cluster_process

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

_SHOUT = [
    {"prompt": word, "answer": word.upper()}
    for word in ("apple", "river", "stone", "window", "garden", "paper", "winter", "silver")
]
_N_ASKED = 6  # enough for both gateways to be asked


@pytest.fixture(scope="module")
def making(pulled_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """Two gateways and one engine with the base that sentences are answered for."""
    folder = tmp_path_factory.mktemp("making")
    server = {
        "state-dir": str(folder / "state"),
        "dtype": "float32",
        "threads": 1,
        "kv-memory": "512MiB",
        "adapter-memory": "128MiB",
        "allow-training": True,
    }
    config = {"server": server, "engines": {"replicas": 1}}
    home = {"LORAPLEX_HOME": str(loraplex_home())}  # where base and encoder were pulled to
    with cluster_process(config, folder, home) as cluster:
        yield cluster


def test_the_demos_are_there_and_answer_as_the_readme_says(making: ClusterProcess) -> None:
    asked = {
        "adapter": "german-numbers",
        "messages": [{"role": "user", "content": "437"}],
        "temperature": 0,
    }
    answer = httpx.post(f"{making.url}{CHAT}", json=asked, timeout=600).json()
    assert "choices" in answer, answer
    assert answer["choices"][0]["message"]["content"] == "vierhundertsiebenunddreißig"


def test_what_was_trained_is_served_by_every_gateway_as_peft_does(
    making: ClusterProcess, pulled_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    body = {"name": "ab", "examples": PAIRS, "rank": 2, "lr": 0.01, "steps": 4}
    with httpx.Client(base_url=making.url, timeout=600) as client:
        started = client.post(TRAIN, json=body)
        assert started.status_code == 202, started.text
        end = _ended(client, started.json()["id"])
        assert end["status"] == "succeeded", end
        assert end["training"]["step"] == 4
        asked = {
            "adapter": "ab",
            "messages": [{"role": "user", "content": "word 77"}],
            "temperature": 0,
            "max_tokens": 2,
            "return_token_ids": True,
        }
        answers = [client.post(CHAT, json=asked).json() for _ in range(_N_ASKED)]
    assert {answer["adapter"]["digest"] for answer in answers} == {end["digest"]}
    files = files_of(end["digest"], tmp_path_factory.getbasetemp())
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pulled_base), files)
    expected = greedy(trained, pulled_base, "word 77", 2)
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [expected] * _N_ASKED


def test_what_a_request_brings_is_learnt_once_and_its_job_is_known_everywhere(
    making: ClusterProcess,
) -> None:
    wish = {"description": "Write the word in capital letters.", "examples": _SHOUT}
    asked = {
        "adapter": wish,
        "messages": [{"role": "user", "content": "bottle"}],
        "temperature": 0,
        "max_tokens": 8,
    }
    with httpx.Client(base_url=making.url, timeout=600) as client:
        with ThreadPoolExecutor(_N_ASKED) as pool:
            asking = [pool.submit(client.post, CHAT, json=asked) for _ in range(_N_ASKED)]
        first = [one.result().json() for one in asking]
        jobs = {_job(answer) for answer in first}
        assert len(jobs) == 1, first
        states = [client.get(f"/v1/jobs/{next(iter(jobs))}").json() for _ in range(_N_ASKED)]
        assert {state["id"] for state in states} == jobs
        end = _ended(client, jobs.pop())
        assert end["status"] == "succeeded", end
        later = [client.post(CHAT, json=asked).json()["adapter"] for _ in range(_N_ASKED)]
    assert {answer["digest"] for answer in later} == {end["digest"]}
    assert {answer["chosen_by"]["serves"] for answer in later} == {"learnt"}


def _ended(client: httpx.Client, job: str) -> dict[str, Any]:
    """The last of the job's events."""
    with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert answer.status_code == 200
        states = [line.removeprefix("data: ") for line in answer.iter_lines() if line[-1:] == "}"]
    last: dict[str, Any] = json.loads(states[-1])
    return last


def _job(answer: dict[str, Any]) -> str:
    """Of an answer with the examples as turns."""
    told = answer["adapter"]["chosen_by"]
    assert told["serves"] == "turns"
    found = told["job"]
    assert isinstance(found, str)
    return found
