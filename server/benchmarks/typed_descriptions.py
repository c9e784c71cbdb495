"""Descriptions as people type them, and what a real server answers: the table of the docs.

    python server/benchmarks/typed_descriptions.py --threads 2 --out FILE

Each description is sent as `POST /v1/chat/completions` with `"adapter": {"description": …}`,
greedy, with the first two test inputs of the task that is meant. No description and no input was
trained on; combinations of operation and format that were are marked "trained". Every description
of the list is in the table. `--url` asks a running server. Prints Markdown; `--out` writes it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loadtests.client import admin_client
from loadtests.systems import Loraplex, started
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task, exact
from loraplex_server.model.pull import resolve_model

CHAT = "/v1/chat/completions"
N_INPUTS = 2
DESCRIPTIONS = (  # (what the user types, the task that is meant)
    ("pluralise and put it in quotes", "plural/quotes"),
    ("city in json please", "record-city/json"),
    ("what city is it? full sentence", "record-city/sentence"),
    ("give me the amount as json", "record-amount/json"),
    ("date in Spanish, plain", "date.es/plain"),
    ("say the date in English with quotes around it", "date.en/quotes"),
    ("the date in German, JSON", "date.de/json"),
    ("number in German inside an answer tag", "card.de/tag"),
    ("turn the list around and give me JSON", "list-reverse/json"),
    ("initials of the name in capital letters", "initials/caps"),
    ("please wrap the person's initials in an answer tag", "initials/tag"),
    ("write the date in Italian", "date.it/plain"),
    ("the second thing in the list", "list-second/plain"),
    ("Give the minutes as hours", "minutes/plain"),
)


class Reply(NamedTuple):
    description: str
    prompt: str
    text: str  # of the model, or of the refusal
    verdict: str
    trained: bool  # this very combination


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; default: one is started")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with server(options.url, options.threads) as client:
        replies = list(ask_all(client))
    text = table(replies)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


@contextmanager
def server(url: str | None, n_threads: int) -> Iterator[httpx.Client]:
    with ExitStack() as stack:
        if url is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            system = Loraplex({"threads": n_threads})
            url = stack.enter_context(started(system, resolve_model(), [], work)).url
        yield stack.enter_context(admin_client(url))


def ask_all(client: httpx.Client) -> Iterator[Reply]:
    trained = set(load_split().sets["train"])
    for description, task in DESCRIPTIONS:
        for example in Task.parse(task).examples("test", N_INPUTS):
            status, answer = ask(client, description, example.prompt)
            if status == 200:
                text = answer["choices"][0]["message"]["content"]
                verdict = "right" if exact(text, example.answer) else f"not `{example.answer}`"
            elif status == 422:  # whatever the input
                message = answer["error"]["message"].partition(";")[0]
                yield Reply(description, "", f"422, {message}", "refused", task in trained)
                break
            else:
                raise RuntimeError(f"POST {CHAT} answered {status}: {answer}")
            yield Reply(description, example.prompt, text, verdict, task in trained)


def ask(client: httpx.Client, description: str, prompt: str) -> tuple[int, dict[str, Any]]:
    body = {
        "adapter": {"description": description},
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 48,
    }
    response = client.post(CHAT, json=body)
    return response.status_code, response.json()


def table(replies: list[Reply]) -> str:
    lines = ["| description | input | reply | |", "| --- | --- | --- | --- |"]
    for reply in replies:
        description = f"{reply.description} (trained)" if reply.trained else reply.description
        cells = [description, reply.prompt, f"`{' '.join(reply.text.split())}`", reply.verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
