"""`loraplex chat` against a real server: it streams, switches adapters, and fails in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.cli.app import app
from loraplex_server.cli.chat import ChatSession
from loraplex_server.cli.server_client import Refused, server_client
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

N_TOKENS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("chat")
    model = save_tiny_model(folder / "tiny")
    spec = BaseSpec.of(tiny_model(eos_token_id=2, max_position_embeddings=4096), "tiny")
    write_lora(folder / "adapters" / "loud", spec, scale=1.0)
    with server_process(model, folder / "state", "--adapters-dir", folder / "adapters") as running:
        yield running


def answer_of(server: ServerProcess, messages: list[dict[str, str]], **fields: object) -> str:
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": N_TOKENS}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | fields, timeout=60)
    content = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


@contextmanager
def session_on(server: ServerProcess, system: str | None = None) -> Iterator[ChatSession]:
    with server_client(server.url, None, 60.0) as client:
        yield ChatSession(client, system=system, max_tokens=N_TOKENS)


def test_an_answer_streams_and_is_remembered(server: ServerProcess) -> None:
    user = {"role": "user", "content": "hi"}
    first = answer_of(server, [user])
    with session_on(server) as session:
        pieces = list(session.ask("hi"))
        assert len(pieces) > 1
        assert "".join(pieces) == first
        second = answer_of(
            server, [user, {"role": "assistant", "content": first}, {**user, "content": "more"}]
        )
        assert "".join(session.ask("more")) == second
        session.reset()
        assert "".join(session.ask("hi")) == first


def test_an_adapter_answers_in_a_new_conversation(server: ServerProcess) -> None:
    user = [{"role": "user", "content": "hi"}]
    plain, loud = answer_of(server, user), answer_of(server, user, adapter="loud")
    assert plain != loud
    with session_on(server) as session:
        assert "".join(session.ask("hi")) == plain
        session.use("loud")
        assert "".join(session.ask("hi")) == loud
        session.use('{"name": "loud"}')
        assert "".join(session.ask("hi")) == loud
        session.use(None)
        assert "".join(session.ask("hi")) == plain


def test_the_system_prompt_is_sent(server: ServerProcess) -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    with session_on(server, system="be kind") as session:
        assert "".join(session.ask("hi")) == answer_of(server, turns)


def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_came(
    server: ServerProcess,
) -> None:
    with session_on(server) as session:
        pieces = session.ask("hi")
        part = next(pieces)
        pieces.close()
        turns = [("user", "hi"), ("assistant", part), ("user", "more")]
        expected = answer_of(server, [{"role": role, "content": text} for role, text in turns])
        assert "".join(session.ask("more")) == expected


def test_an_unknown_adapter_is_refused_and_the_old_one_stays(server: ServerProcess) -> None:
    with session_on(server) as session:
        session.use("loud")
        for refused in ("quiet", "{quiet"):
            with pytest.raises(Refused, match="quiet"):
                session.use(refused)
            assert session.adapter_name == "loud"
            loud = answer_of(server, [{"role": "user", "content": "hi"}], adapter="loud")
            assert "".join(session.ask("hi")) == loud
            session.reset()
        session.use("loud@ffffffff")  # only the server can tell: with the first question
        with pytest.raises(Refused, match="loud"):
            list(session.ask("hi"))


def test_the_terminal_shows_answers_adapters_and_mistakes(server: ServerProcess) -> None:
    commands = ["/help", "/adapters", "/adapter loud", "hi", "/adapter quiet", "/dance", "/quit"]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        app,
        ["chat", "--url", server.url, "--max-tokens", str(N_TOKENS)],
        input="\n".join([*commands, "never sent"]) + "\n",
    )
    assert result.exit_code == 1  # something failed, and nobody sat at the terminal to see it
    loud = answer_of(server, [{"role": "user", "content": "hi"}], adapter="loud")
    for text in ("/system TEXT", "answers come from loud now", loud, "/dance is no command"):
        assert text in result.output
    assert "error: " in result.output
    assert "Traceback" not in result.output


def test_a_description_is_shown_as_it_is(server: ServerProcess) -> None:
    card, text = f"{server.url}/v1/adapters/loud", "Ends with [/INST] :smile:"
    httpx.patch(card, json={"description": text}).raise_for_status()
    result = CliRunner().invoke(app, ["chat", "--url", server.url], input="/adapters\n")
    assert result.exit_code == 0, result.output
    assert text in result.output


def test_an_empty_adapter_is_an_error_of_one_line(server: ServerProcess) -> None:
    result = CliRunner().invoke(app, ["chat", "--url", server.url, "--adapter", ""])
    assert result.exit_code == 1
    assert "error: the adapter's name is empty" in result.output


def test_a_piped_question_ends_well(server: ServerProcess) -> None:
    arguments = ["chat", "--url", server.url, "--adapter", "loud", "--max-tokens", str(N_TOKENS)]
    result = CliRunner().invoke(app, arguments, input="hi\n")
    assert result.exit_code == 0
    assert answer_of(server, [{"role": "user", "content": "hi"}], adapter="loud") in result.output


def test_without_a_server_it_says_how_to_start_one() -> None:
    result = CliRunner().invoke(app, ["chat", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "no server answers at http://127.0.0.1:9; run `loraplex serve`" in result.output


def test_eval_scores_the_base_and_an_adapter_on_the_same_chats(
    server: ServerProcess, tmp_path: Path
) -> None:
    """The expected answers are what the adapter says, but for one row."""
    texts = [f"question {index} <b>" for index in range(6)]
    lines = []
    for index, text in enumerate(texts):
        message = {"role": "user", "content": text}
        loud = answer_of(server, [message], adapter="loud")
        assert loud.strip()
        assert loud != answer_of(server, [message])
        expected = loud if index else f"{loud} and more"
        if index % 2:
            lines.append({"prompt": text, "answer": expected})
        else:
            lines.append({"messages": [message, {"role": "assistant", "content": expected}]})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.html"
    options = ["--url", server.url, "--max-tokens", str(N_TOKENS), "--page", str(page)]
    result = CliRunner().invoke(app, ["eval", str(data), "-a", "loud", *options])
    assert result.exit_code == 0, result.output
    base, loud = (line for line in result.output.splitlines() if "%" in line)
    assert base.split()[:3] == ["base", "0", "%"]
    assert loud.split()[:3] == ["loud", "83", "%"]
    assert loud.rstrip().endswith("better")
    html = page.read_text()
    assert html.count('class="right"') == 5
    assert "question 3 &lt;b&gt;" in html
    missing = CliRunner().invoke(app, ["eval", str(data), "-a", "lout", *options])
    assert missing.exit_code == 1
    assert "lout" in missing.output
    data.write_text('{"prompt": "x"}')
    broken = CliRunner().invoke(app, ["eval", str(data), *options])
    assert broken.exit_code == 1
    assert "rows.jsonl:1" in broken.output
