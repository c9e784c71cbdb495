"""Fine-tuning through the official openai client, against a real server process."""

import csv
import hashlib
import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_server.evaluation.comparison import BASE, compare, read_rows
from loraplex_server.evaluation.metrics import METRICS
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

KEYS = {
    "acme-key": 'tenant = "acme"\nmax_training_tokens = 200000\nmax_jobs = 2',
    "umbra-key": 'tenant = "umbra"\nmax_training_tokens = 500',
}
SUPERVISED = [
    {
        "messages": [
            {"role": "user", "content": f"word {i}"},
            {"role": "assistant", "content": "AB"},
        ]
    }
    for i in range(16)
]
PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": f"word {i}"}]},
        "preferred_output": [{"role": "assistant", "content": "AB"}],
        "non_preferred_output": [{"role": "assistant", "content": "xy"}],
    }
    for i in range(16)
]
FAST = {"n_epochs": 16, "batch_size": 6, "learning_rate_multiplier": 20.0}


def _serve(folder: Path, *flags: str) -> Any:
    keys = folder / "keys.toml"
    keys.write_text(
        "\n".join(
            f'[[key]]\nname = "{name}"\nscope = "admin"\n{table}\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"'
            for name, table in KEYS.items()
        )
    )
    keys.chmod(0o600)
    return server_process(
        folder / "tiny", folder / "state", "--allow-training", "--keys", keys, *flags
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine-tuning")
    save_tiny_model(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with _serve(folder) as server:
        yield server


def _client(server: ServerProcess, key: str = "acme-key") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with _client(server) as client:
        yield client


def _upload(client: OpenAI, lines: list[Any]) -> FileObject:
    content = "\n".join(map(json.dumps, lines)).encode()
    return client.files.create(file=("examples.jsonl", content), purpose="fine-tune")


def _ended(client: OpenAI, job_id: str) -> FineTuningJob:
    """Ask until the job has ended. The server answers when it has."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id, extra_query={"timeout_s": 60})
        if job.status in ("succeeded", "failed", "cancelled"):
            return job


def _cancel(client: OpenAI, job_id: str) -> FineTuningJob:
    """Cancel the job, and wait until it counts no more in ``max_jobs``: for its last step."""
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    return _ended(client, job_id)


def _steps(client: OpenAI, job_id: str) -> list[Any]:
    """The data of the steps so far, oldest first."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.data for event in events if event.type == "metrics"][::-1]


def _wait_for_step(server: ServerProcess, job_id: str, step: int) -> None:
    """Follow the job until it has done so many steps."""
    url = f"{server.url}/v1/jobs/{job_id}/events"
    headers = {"authorization": "Bearer acme-key"}
    with httpx.stream("GET", url, headers=headers, timeout=300) as answer:
        for line in answer.iter_lines():
            state = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            if state.get("training") and state["training"]["step"] >= step:
                return
    raise AssertionError(state)


def _ask(client: OpenAI, model: str, text: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=8,
        temperature=0,
    )
    return str(answer.choices[0].message.content)


class _Scores(NamedTuple):
    loss: float  # of the answers and their ends, in nats a token
    exact: float  # share of the answers that greedy decoding gives whole
    token_accuracy: float


@torch.no_grad()
def _scores(model: Any, folder: Path, lines: list[Any]) -> _Scores:
    """Score the answers by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, n, n_exact, n_right = 0.0, 0, 0, 0
    for line in lines:
        prompt, answer = (message["content"] for message in line["messages"])
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(text, return_tensors="pt").input_ids
        tail = tokenizer(f"{answer}<|im_end|>", return_tensors="pt").input_ids
        labels = torch.cat([torch.full_like(head, -100), tail], 1)
        output = model(input_ids=torch.cat([head, tail], 1), labels=labels)
        right = output.logits[0, head.shape[1] - 1 : -1].argmax(-1) == tail[0]
        total += float(output.loss) * tail.shape[1]
        n += tail.shape[1]
        n_exact += bool(right.all())
        n_right += int(right.sum())
    return _Scores(total / n, n_exact / len(lines), n_right / n)


def _evaluated(
    server: ServerProcess, folder: Path, adapter: str, lines: list[Any], metric: str
) -> dict[str, object]:
    """Score the answers as `loraplex eval` does: chats over HTTP."""
    data = folder / "eval.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    headers = {"authorization": "Bearer acme-key"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:

        def ask(body: dict[str, object]) -> dict[str, Any]:
            chat = {"model": "tiny", "max_tokens": 256, **body}
            answer = http.post("/v1/chat/completions", json=chat)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        before, after = compare(ask, [BASE, adapter], read_rows(data), METRICS[metric])
    assert after.gain is not None
    return {
        "metric": metric,
        "n_answers": len(lines),
        "score_before": round(before.mean.value, 4),
        "score_after": round(after.mean.value, 4),
        "gain": [round(part, 4) for part in after.gain],
    }


def _greedy(model: Any, folder: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    head = tokenizer(text, return_tensors="pt")
    made = model.generate(**head, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0, head.input_ids.shape[1] :], skip_special_tokens=True))


def _peft(folder: Path, digest: str) -> Any:
    """The adapter as PEFT reads the files that the server keeps."""
    (path,) = (
        path.parent
        for path in (folder / "state").rglob("adapter_model.safetensors")
        if digest[:12] in str(path.parent)
    )
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "tiny"), path)


def test_a_supervised_job_makes_a_model_that_answers_and_that_peft_agrees_on(
    client: OpenAI, folder: Path, server: ServerProcess
) -> None:
    file = _upload(client, SUPERVISED[:12])
    held_out = _upload(client, SUPERVISED[12:])
    assert (file.purpose, file.status) == ("fine-tune", "processed")
    created = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        validation_file=held_out.id,
        suffix="says-ab",
        seed=7,
        metadata={"of": "a test"},
        method={"type": "supervised", "supervised": {"hyperparameters": FAST}},
        extra_body={"adapter": "ab", "metric": "rouge-l"},
    )
    assert (created.status, created.fine_tuned_model) == ("validating_files", None)
    job = _ended(client, created.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny:says-ab:")
    assert (job.seed, job.metadata, job.organization_id) == (7, {"of": "a test"}, "acme")
    assert job.hyperparameters.n_epochs == 16
    assert (job.finished_at or 0) >= job.created_at

    steps = _steps(client, job.id)
    assert [step["step"] for step in steps] == list(range(1, 33))  # 12 examples by 6, 16 epochs
    assert steps[-1]["train_loss"] < 0.8 * steps[0]["train_loss"]
    (results,) = job.result_files
    rows = list(csv.DictReader(io.StringIO(client.files.content(results).text)))
    assert [float(row["train_loss"]) for row in rows] == [step["train_loss"] for step in steps]
    assert rows[-1]["valid_loss"] != ""
    listed = client.files.list(purpose="fine-tune-results")
    assert [each.id for each in listed] == [results]

    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model

    headers = {"authorization": "Bearer acme-key"}
    cards = [
        httpx.get(f"{server.url}/v1/adapters/{name}", headers=headers).json()
        for name in (job.fine_tuned_model, "ab")
    ]
    assert cards[0]["digest"] == cards[1]["digest"]
    training = cards[0]["provenance"]["training"]
    assert (
        training["data_sha256"] == hashlib.sha256(client.files.content(file.id).content).hexdigest()
    )
    assert (training["steps_done"], training["n_steps"]) == (32, 32)
    assert training["loss_curve"] == [[step["step"], step["train_loss"]] for step in steps]
    judged = training["evaluation"]
    assert judged["on"] == "validation file"
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    before = _scores(base, folder / "tiny", SUPERVISED[12:])
    trained = _peft(folder, cards[0]["digest"])
    after = _scores(trained, folder / "tiny", SUPERVISED[12:])
    assert judged["loss_before"] == pytest.approx(before.loss, rel=1e-3)
    assert judged["loss_after"] == pytest.approx(after.loss, rel=1e-3)
    assert after.loss < 0.8 * before.loss
    assert (judged["exact_before"], judged["exact_after"]) == (before.exact, after.exact)
    assert steps[-1]["valid_exact"] == after.exact
    accuracy = float(rows[-1]["valid_mean_token_accuracy"])
    assert accuracy == pytest.approx(after.token_accuracy, abs=1e-4)
    assert after.token_accuracy >= before.token_accuracy
    scores = job.to_dict()["evaluation"]
    assert scores == _evaluated(server, folder, job.fine_tuned_model, SUPERVISED[12:], "rouge-l")
    assert scores["score_after"] > scores["score_before"]  # type: ignore[index]
    assert judged.items() >= scores.items()  # type: ignore[attr-defined]
    listed_names = {each.id for each in client.models.list()}
    assert not any("evaluated" in name for name in listed_names)

    answer = _greedy(trained, folder / "tiny", "word 99")
    assert [_ask(client, name, "word 99") for name in (job.fine_tuned_model, "ab")] == [answer] * 2
    assert _ask(client, "tiny", "word 99") != answer

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [each.step_number for each in checkpoints] == [32, 30, 28]  # the last three epochs
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoints[0].metrics.full_valid_loss == steps[-1]["full_valid_loss"]
    assert checkpoints[0].metrics.to_dict()["score_after"] == scores["score_after"]  # type: ignore[index]
    assert _ask(client, checkpoints[1].fine_tuned_model_checkpoint, "word 99") != ""
    for status in ("cancel", "pause", "resume"):
        with pytest.raises(openai.ConflictError, match="the job is succeeded"):
            getattr(client.fine_tuning.jobs, status)(job.id)


def test_a_job_trains_the_family_that_it_names(
    client: OpenAI, folder: Path, server: ServerProcess
) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=_upload(client, SUPERVISED).id,
        method={"type": "supervised", "supervised": {"hyperparameters": {**FAST, "n_epochs": 4}}},
        extra_body={"family": "dora", "rank": 4},
    )
    job = _ended(client, job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    headers = {"authorization": "Bearer acme-key"}
    path = f"{server.url}/v1/adapters/{job.fine_tuned_model}"
    card = httpx.get(path, headers=headers).json()
    training = card["provenance"]["training"]
    assert (training["family"], training["rank"], training["alpha"]) == ("dora", 4, 8.0)
    trained = _peft(folder, card["digest"])
    assert trained.peft_config["default"].use_dora
    answer = _greedy(trained, folder / "tiny", "word 99")
    assert _ask(client, job.fine_tuned_model, "word 99") == answer


def test_dpo_prefers_the_preferred_answers(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=_upload(client, PREFERENCES).id,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {**FAST, "beta": 0.5, "learning_rate_multiplier": 50.0}},
        },
    )
    job = _ended(client, job.id)
    assert job.status == "succeeded", job.error
    steps = _steps(client, job.id)
    assert steps[0]["train_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the base itself
    assert steps[-1]["train_loss"] < 0.3
    assert (steps[0]["train_accuracy"], steps[-1]["train_accuracy"]) == (0.0, 1.0)
    assert job.to_dict()["method"]["dpo"]["hyperparameters"]["beta"] == 0.5  # type: ignore[index]

    def margin(model: str) -> float:
        scores = []
        for answer in ("AB", "xy"):
            text = f"<|im_start|>user\nword 3<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
            scored = client.completions.create(
                model=model, prompt=text, max_tokens=0, echo=True, logprobs=0
            )
            assert scored.choices[0].logprobs is not None
            values = scored.choices[0].logprobs.token_logprobs
            assert values is not None
            scores.append(sum(value for value in values if value is not None))
        return scores[0] - scores[1]

    assert job.fine_tuned_model is not None
    assert margin(job.fine_tuned_model) > margin("tiny") + 1


def test_auto_hyperparameters_are_told_once_the_files_are_read(
    client: OpenAI, server: ServerProcess
) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=_upload(client, SUPERVISED[:2]).id
    )
    assert job.hyperparameters.n_epochs == "auto"
    _wait_for_step(server, job.id, 1)
    _cancel(client, job.id)
    told = client.fine_tuning.jobs.retrieve(job.id).hyperparameters
    assert (told.n_epochs, told.batch_size, told.learning_rate_multiplier) == (25, 2, 1.0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "sage", "content": "x"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, "weight"),
        ({"messages": [{"role": "assistant", "content": {"a": 1}}]}, "content must be a text"),
        ({**SUPERVISED[0], "prompt": "x"}, "unknown field 'prompt'"),
        (PREFERENCES[0], "is for the method 'dpo', line 1 for 'supervised'"),
        ({"input": {}, "preferred_output": []}, "input.messages"),
    ],
)
def test_a_bad_line_refuses_the_file_and_is_named(client: OpenAI, line: Any, told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"line 2: ") as raised:
        _upload(client, [SUPERVISED[0], line])
    assert told in raised.value.message


def test_what_cannot_be_trained_is_refused_with_the_field(client: OpenAI) -> None:
    file = _upload(client, SUPERVISED).id
    create = client.fine_tuning.jobs.create
    refused: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
        ({"model": "gpt-4o-mini"}, openai.NotFoundError, "model"),
        ({"training_file": "file-none"}, openai.NotFoundError, "training_file"),
        (
            {"validation_file": _upload(client, PREFERENCES).id},
            openai.BadRequestError,
            "validation_file",
        ),
        ({"method": {"type": "dpo"}}, openai.BadRequestError, "training_file"),
        (
            {"method": {"type": "dpo"}, "extra_body": {"metric": "exact"}},
            openai.BadRequestError,
            "metric",
        ),
        ({"extra_body": {"metric": "bleu"}}, openai.BadRequestError, "metric"),
        ({"method": {"type": "reinforcement"}}, openai.BadRequestError, "method.type"),
        ({"extra_body": {"family": "magic"}}, openai.BadRequestError, "family"),
        ({"extra_body": {"recipe": "kasa", "family": "dora"}}, openai.BadRequestError, "recipe"),
        ({"suffix": "a b"}, openai.BadRequestError, "suffix"),
        ({"hyperparameters": {"n_epochs": 0}}, openai.BadRequestError, "hyperparameters.n_epochs"),
        ({"extra_body": {"adapter": "a b"}}, openai.BadRequestError, "name"),
        ({"extra_body": {"adapter": "ft:a:b:c"}}, openai.PermissionDeniedError, "name"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
            openai.BadRequestError,
            "integrations",
        ),
    ]
    for change, error, param in refused:
        with pytest.raises(error) as raised:
            create(**{"model": "tiny", "training_file": file, **change})
        assert raised.value.param == param, raised.value


def test_an_example_beyond_the_context_fails_the_job_with_its_line(client: OpenAI) -> None:
    long = {"messages": [*SUPERVISED[0]["messages"], {"role": "user", "content": "x " * 4000}]}
    long["messages"].append({"role": "assistant", "content": "AB"})
    file = _upload(client, [SUPERVISED[0], long])
    job = _ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file.id).id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "line 2 of the training file" in job.error.message


def test_a_job_pauses_resumes_and_is_cancelled(client: OpenAI, server: ServerProcess) -> None:
    jobs = client.fine_tuning.jobs
    file = _upload(client, SUPERVISED)
    job = jobs.create(
        model="tiny",
        training_file=file.id,
        metadata={"kind": "long"},
        hyperparameters={"n_epochs": 100, "batch_size": 1},
    )
    _wait_for_step(server, job.id, 1)
    with pytest.raises(openai.ConflictError, match="cancel it first"):
        client.files.delete(file.id)
    assert jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.ConflictError, match="paused"):
        jobs.pause(job.id)
    resumed = jobs.resume(job.id)
    assert resumed.status == "queued"
    stopped_at = _steps(client, job.id)[-1]["step"]
    _wait_for_step(server, job.id, stopped_at + 1)
    events = [event.message for event in jobs.list_events(job.id, limit=100)]
    assert f"Going on from the checkpoint of step {stopped_at}" in events
    assert [each.id for each in jobs.list(extra_query={"metadata[kind]": "long"})] == [job.id]
    ended = _cancel(client, job.id)
    assert (ended.status, ended.fine_tuned_model, ended.result_files) == ("cancelled", None, [])
    steps = [step["step"] for step in _steps(client, job.id)]
    assert steps == list(range(1, len(steps) + 1))  # none twice
    assert client.files.delete(file.id).deleted


def test_jobs_and_events_are_listed_page_by_page(client: OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    file = _upload(client, SUPERVISED).id
    ids = []
    for _ in range(3):
        ids.append(jobs.create(model="tiny", training_file=file).id)
        _cancel(client, ids[-1])
    assert [job.id for job in jobs.list(limit=2)][:3] == ids[::-1]  # turns pages by itself
    messages = [event.message for event in jobs.list_events(ids[0], limit=1)]
    assert messages[-1] == f"Created fine-tuning job: {ids[0]}"
    assert "The job is cancelled" in messages


def test_tenants_see_only_their_own_and_quotas_are_theirs(
    client: OpenAI, server: ServerProcess
) -> None:
    file = _upload(client, SUPERVISED).id
    settings = {"n_epochs": 100, "batch_size": 1}
    make = client.fine_tuning.jobs.create
    ours = [
        make(model="tiny", training_file=file, hyperparameters={"n_epochs": 40, "batch_size": 1})
        for _ in range(2)
    ]
    with pytest.raises(openai.RateLimitError, match="max_jobs"):
        make(model="tiny", training_file=file)
    with _client(server, "umbra-key") as other:
        theirs = other.fine_tuning.jobs
        assert theirs.list().data == []
        for call in (theirs.retrieve, theirs.cancel, theirs.pause, theirs.resume):
            with pytest.raises(openai.NotFoundError):
                call(ours[0].id)
        for of_job in (theirs.list_events, theirs.checkpoints.list):
            with pytest.raises(openai.NotFoundError):
                of_job(ours[0].id)
        with pytest.raises(openai.NotFoundError):
            theirs.create(model="tiny", training_file=file)
        own = _upload(other, SUPERVISED).id
        job = _ended(
            other, theirs.create(model="tiny", training_file=own, hyperparameters=settings).id
        )
        assert job.status == "failed"
        assert job.error is not None
        assert job.error.code == "quota_exceeded"
        assert "max_training_tokens" in job.error.message
    for job in ours:
        _cancel(client, job.id)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_after_a_kill_a_job_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """The digest of a model covers all bits of its weights."""
    order: dict[str, Any] = {
        "model": "tiny",
        "seed": 3,
        "method": {"type": method, method: {"hyperparameters": {**FAST, "n_epochs": 8}}},
    }
    lines = SUPERVISED if method == "supervised" else PREFERENCES
    digests = []
    for kills in (False, True):
        home = tmp_path / str(kills)
        home.mkdir()
        (home / "tiny").symlink_to(folder / "tiny")
        with _serve(home) as server, _client(server) as client:
            order["training_file"] = _upload(client, lines).id
            job = client.fine_tuning.jobs.create(**order)
            if not kills:
                digests.append(_digest(server, _ended(client, job.id)))
                continue
            _wait_for_step(server, job.id, 5)  # the checkpoint of the first epoch is written
            assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
            server.signal(signal.SIGKILL)
            server.wait()
        with _serve(home) as server, _client(server) as client:
            digests.append(_digest(server, _ended(client, job.id)))
            events = client.fine_tuning.jobs.list_events(job.id, limit=100)
            assert any("Going on from the checkpoint" in event.message for event in events)
            steps = [step["step"] for step in _steps(client, job.id)]
            assert steps == list(range(1, 25))
    assert digests[0] == digests[1]


def _digest(server: ServerProcess, job: FineTuningJob) -> str:
    assert job.status == "succeeded", job.error
    url = f"{server.url}/v1/adapters/{job.fine_tuned_model}"
    card = httpx.get(url, headers={"authorization": "Bearer acme-key"}).json()
    return str(card["digest"])
