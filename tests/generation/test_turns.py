"""The base with examples as turns, held against transformers' own forward of the whole chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loraplex_generation.turns import score_turns
from loraplex_generation.zoo.tasks import Example
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tiny_zoo import tiny_base, tiny_codec, tiny_directory

PAIRS = [Example(word, word.upper()) for word in ("red", "blue", "green", "plum", "gold")]
FOLDS = (frozenset({0, 2}), frozenset({4}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("base"))


def test_each_fold_is_answered_behind_the_pairs_outside_it(directory: Path) -> None:
    scored = score_turns(tiny_base(directory), tiny_codec(), "shout", PAIRS, FOLDS, n_tokens=512)
    model = LlamaForCausalLM.from_pretrained(directory)
    nlls, right = [], []
    for fold in FOLDS:
        shown = [pair for i, pair in enumerate(PAIRS) if i not in fold]
        scores = [_nll(model, "shout", shown, PAIRS[i]) for i in sorted(fold)]
        nlls.append(sum(nll for nll, _, _ in scores) / sum(n for _, n, _ in scores))
        right += [hit for _, _, hit in scores]
    assert scored.nll == pytest.approx(sum(nlls) / len(nlls), abs=1e-4)
    assert (scored.exact, scored.n) == (sum(right), 3)


def test_of_more_turns_than_there_is_room_for_the_first_half_is_shown(directory: Path) -> None:
    codec = tiny_codec()
    n_tokens = len(codec.row(PAIRS[4], instruction="shout", earlier=PAIRS[:2]).tokens)
    base = tiny_base(directory)
    few = score_turns(base, codec, "shout", PAIRS, FOLDS[1:], n_tokens=n_tokens)
    model = LlamaForCausalLM.from_pretrained(directory)
    nll, n, _ = _nll(model, "shout", PAIRS[:2], PAIRS[4])
    assert few.nll == pytest.approx(nll / n, abs=1e-4)


@torch.inference_mode()
def _nll(
    model: LlamaForCausalLM, sentence: str, shown: Sequence[Example], asked: Example
) -> tuple[float, int, bool]:
    """Of the answer and the end of its turn: the sum, the tokens, and whether greedy gives it."""
    tokenizer = tiny_tokenizer()
    chat = [
        {"role": role, "content": text}
        for pair in (*shown, asked)
        for role, text in (("user", pair.prompt), ("assistant", pair.answer))
    ]
    chat[0]["content"] = f"{sentence}\n{chat[0]['content']}"
    asks = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    ids = tokenizer.encode(whole, add_special_tokens=False)
    n = len(ids) - len(tokenizer.encode(asks, add_special_tokens=False))
    logits = model(torch.tensor([ids])).logits[0, -n - 1 : -1].float()
    target = torch.tensor(ids[-n:])
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    return float(nll), n, bool((logits.argmax(-1) == target).all())
