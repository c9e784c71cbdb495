"""Chat examples become tokens, and only what the assistant wrote is to be learnt."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from loraplex_training.batches import endless
from loraplex_training.engine.data import Datum
from loraplex_training.errors import ExamplesError
from loraplex_training.examples import (
    Chat,
    Message,
    held_out,
    read_jsonl,
    tokenise,
)
from tests.support.bases.tiny_tokenizer import tiny_tokenizer


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat([Message(role=role, content=content) for role, content in turns])


def test_exactly_the_replies_and_their_end_tokens_are_learnt() -> None:
    tokenizer = tiny_tokenizer()
    example = tokenise(
        chat(("user", "hi 你"), ("assistant", "Grüße!"), ("user", "more"), ("assistant", "ok")),
        tokenizer,
        max_len=200,
        where="x",
    )
    learnt = [token for token, learn in zip(example.tokens, example.learn, strict=True) if learn]
    assert tokenizer.decode(learnt) == "Grüße!<|im_end|>ok<|im_end|>"
    assert example.tokens[-1] == tokenizer.eos_token_id


def test_what_comes_before_a_reply_is_what_a_server_would_send() -> None:
    tokenizer = tiny_tokenizer()
    example = tokenise(
        chat(("system", "be brief"), ("user", "2 + 2?"), ("assistant", "4")),
        tokenizer,
        max_len=200,
        where="x",
    )
    prompt = tokenizer.apply_chat_template(
        chat(("system", "be brief"), ("user", "2 + 2?")).messages, add_generation_prompt=True
    )["input_ids"]
    first = example.learn.index(True)
    assert list(example.tokens[:first]) == prompt


def test_an_example_that_is_too_long_is_refused_not_cut() -> None:
    with pytest.raises(ExamplesError, match=r"line 7 has \d+ tokens, more than 10"):
        tokenise(
            chat(("user", "a b c d e f g"), ("assistant", "h")),
            tiny_tokenizer(),
            max_len=10,
            where="line 7",
        )


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(ExamplesError, match="rewrites earlier turns"):
        tokenise(chat(("user", "a"), ("assistant", "b")), tokenizer, max_len=99, where="x")


def test_tools_and_a_template_of_its_own_are_rendered(tmp_path: Path) -> None:
    line = '{"tools": [{"type": "function", "function": {"name": "f"}}], "messages": ['
    line += '{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    (tmp_path / "data.jsonl").write_text(line)
    (chat,) = read_jsonl(tmp_path / "data.jsonl")
    tokenizer = tiny_tokenizer()
    template = (
        "{% for t in tools %}{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}|{{ m.content }}{% endfor %}{{ '|' if add_generation_prompt }}"
    )
    example = tokenise(chat, tokenizer, max_len=99, where="x", chat_template=template)
    assert tokenizer.decode(example.tokens) == "f|x|y"
    assert tokenizer.decode(example.tokens[example.learn.index(True) :]) == "y"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "data.jsonl:2 is not JSON"),
        ("[]", 'data.jsonl:2 has no "messages" list'),
        ('{"messages": []}', 'data.jsonl:2 has no "messages" list'),
        ('{"messages": [{"role": "robot", "content": "x"}]}', 'data.jsonl:2: a message is {"role"'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'data.jsonl:2: a message is {"role"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', "data.jsonl:2 has no assistant"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "tools": "f"}',
            'data.jsonl:2: "tools" is a list',
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    good = '{"messages": [{"role": "assistant", "content": "x"}]}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ExamplesError) as caught:
        read_jsonl(path)
    assert problem in str(caught.value)


@pytest.mark.parametrize("separator", ["\u0085", "\u2028", "\u2029"])
def test_a_line_ends_where_jsonl_says(tmp_path: Path, separator: str) -> None:
    text = f"x{separator}y"
    line = json.dumps({"messages": [Message(role="assistant", content=text)]}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text(f"{line}\r\n{line}\n", newline="")
    chats = read_jsonl(tmp_path / "data.jsonl")
    assert [chat.messages[0]["content"] for chat in chats] == [text, text]


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="cannot read"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ExamplesError, match="holds no examples"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_an_epoch_shows_every_example_once_in_batches_that_fit() -> None:
    lengths = [3 + (7 * i) % 40 for i in range(101)]
    n_batches = 0
    seen: Counter[int] = Counter()
    for group in endless(lengths, 128, seed=3):
        assert len(group) * max(lengths[i] for i in group) <= 128
        seen.update(group)
        n_batches += 1
        if len(seen) == 101 and min(seen.values()) == 1 and sum(seen.values()) == 101:
            break
    assert n_batches < 30


def test_the_order_depends_on_the_seed_alone() -> None:
    lengths = [5, 9, 30, 4, 12, 22, 7] * 5
    first = list(islice(endless(lengths, 64, seed=1), 40))
    assert first == list(islice(endless(lengths, 64, seed=1), 40))
    assert first != list(islice(endless(lengths, 64, seed=2), 40))


def test_targets_are_the_next_token_and_weigh_where_it_is_to_be_learnt() -> None:
    datum = Datum.of_chat((5, 6, 7, 8), (False, False, True, True))
    assert datum.tokens.tolist() == [5, 6, 7]
    assert datum.targets.tolist() == [6, 7, 8]
    assert datum.weights.tolist() == [0, 1, 1]


def test_what_is_held_out_is_spread_over_the_data_and_fits_its_limit() -> None:
    assert held_out([10] * 60, 0.05) == {0, 20, 40}
    limited = held_out([10] * 60, 0.5, max_tokens=60, seed=1)
    assert len(limited) == 6
    assert limited == held_out([10] * 60, 0.5, max_tokens=60, seed=1) < set(range(0, 60, 2))
    assert len(held_out([10] * 60, 0.5, max_tokens=1)) == 1
    with pytest.raises(ExamplesError, match="2 examples are too few to hold out 2"):
        held_out([10, 10], 0.9)
