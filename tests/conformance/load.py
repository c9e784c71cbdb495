"""Asks a server over HTTP: adapters are put, then everything is asked at once, shuffled."""

import asyncio
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

N_TOKENS = 5  # of each answer
_N_TOP = 20
_TIMEOUT_S = 280.0


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...]
    adapter: object = None  # as a request names it; None: the base
    echo: bool = False  # the prompt's log-probabilities too
    task: str | None = None  # of a classifier, which is asked for logits


@dataclass(frozen=True)
class Answer:
    status: int
    error: str = ""  # the body, where the status is no 200
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of each token
    top: tuple[tuple[float, ...], ...] = ()  # the highest at each token, falling
    prompt_logprobs: tuple[float, ...] = ()  # of each token of the prompt but the first
    logits: list[object] = field(default_factory=list)  # of a classifier: [n_labels], by token


@dataclass(frozen=True)
class Put:
    status: int
    body: dict[str, object]

    @property
    def digest(self) -> str:
        return str(self.body.get("digest"))

    @property
    def message(self) -> str:
        error = self.body.get("error")
        return str(error.get("message")) if isinstance(error, dict) else ""


async def put_upload(client: httpx.AsyncClient, name: str, folder: Path) -> Put:
    with (folder / "adapter_model.safetensors").open("rb") as weights:
        files = {
            "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
            "weights": ("adapter_model.safetensors", weights),
        }
        answer = await client.put(f"/v1/adapters/{name}", files=files)
    return Put(answer.status_code, answer.json())


async def _put_source(client: httpx.AsyncClient, name: str, source: str) -> Put:
    body = {"source": source, "wait": True}
    answer = await client.put(f"/v1/adapters/{name}", json=body)
    return Put(answer.status_code, answer.json())


async def put_all(
    client: httpx.AsyncClient, folders: Sequence[Path], shelf: Path
) -> dict[str, Put]:
    """Folder's name → how it went.

    Every third is laid on the ``shelf``, the server's adapters directory, and named as a source;
    the others are uploads.
    """
    turns = asyncio.Semaphore(4)

    async def put(index: int, folder: Path) -> tuple[str, Put]:
        async with turns:
            if index % 3 == 2:
                source = f"put/by/{folder.name}"  # too deep to be registered by itself
                shutil.copytree(folder, shelf / source, copy_function=os.link)
                return folder.name, await _put_source(client, folder.name, source)
            return folder.name, await put_upload(client, folder.name, folder)

    return dict(await asyncio.gather(*(put(i, folder) for i, folder in enumerate(folders))))


async def ask_all(client: httpx.AsyncClient, questions: Sequence[Question]) -> list[Answer]:
    """Answers in the order of the questions, which are sent at once and in another order."""
    answers: dict[int, Answer] = {}

    async def ask(index: int) -> None:
        question = questions[index]
        answers[index] = await (_ask if question.task is None else _ask_head)(client, question)

    order = list(range(len(questions)))
    random.Random(7).shuffle(order)
    await asyncio.gather(*map(ask, order))
    return [answers[index] for index in range(len(questions))]


async def _ask(client: httpx.AsyncClient, question: Question) -> Answer:
    body: dict[str, object] = {
        "prompt": list(question.prompt),
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": _N_TOP,
        "return_token_ids": True,
        "echo": question.echo,
    }
    if question.adapter is not None:
        body["adapter"] = question.adapter
    answer = await client.post("/v1/completions", json=body, timeout=_TIMEOUT_S)
    if answer.status_code != 200:
        return Answer(answer.status_code, answer.text)
    (choice,) = answer.json()["choices"]
    n_before = len(question.prompt) if question.echo else 0
    shown = choice["logprobs"]
    return Answer(
        200,
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(shown["token_logprobs"][n_before:]),
        top=tuple(
            tuple(sorted(top.values(), reverse=True)) for top in shown["top_logprobs"][n_before:]
        ),
        prompt_logprobs=tuple(shown["token_logprobs"][1:n_before]),
    )


async def _ask_head(client: httpx.AsyncClient, question: Question) -> Answer:
    path, name = {"SEQ_CLS": ("/classify", "probs"), "TOKEN_CLS": ("/pooling", "data")}[
        str(question.task)
    ]
    body = {
        "input": list(question.prompt),
        "adapter": question.adapter,
        "use_activation": False,
    }
    answer = await client.post(path, json=body, timeout=_TIMEOUT_S)
    if answer.status_code != 200:
        return Answer(answer.status_code, answer.text)
    return Answer(200, logits=answer.json()["data"][0][name])


async def ask_alone_and_together(
    client: httpx.AsyncClient, folder: Path, names: Sequence[str], prompts: Sequence[str]
) -> tuple[list[Answer], dict[str, list[Answer]]]:
    """Upload the adapters ``names`` of ``folder`` and ask each, and the base, all prompts.

    Return the base's answers while nobody else asks, and all answers at once by adapter; "" is the
    base.
    """
    for name in names:
        put = await put_upload(client, name, folder / name)
        assert put.status == 201, f"{name}: {put.message}"
    alone = await ask_all(client, [Question(prompt, echo=True) for prompt in prompts])
    asked = [(name, prompt) for name in ("", *names) for prompt in prompts]
    questions = [Question(prompt, name or None, echo=True) for name, prompt in asked]
    together: dict[str, list[Answer]] = {"": [], **{name: [] for name in names}}
    for (name, _), answer in zip(asked, await ask_all(client, questions), strict=True):
        together[name].append(answer)
    return alone, together
