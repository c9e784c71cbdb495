"""The base with examples as turns, held against transformers' own forward of the whole chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from loraplex_generation.judged_pairs import folds, judging
from loraplex_generation.packing import PackedBatch
from loraplex_generation.turns import score_turns
from loraplex_generation.zoo.tasks import Example
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tiny_zoo import tiny_base, tiny_codec, tiny_directory

PAIRS = [Example(word, word.upper()) for word in ("red", "blue", "green", "plum", "gold")]
FOLDS = folds(len(PAIRS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("base"))


def test_each_fold_is_answered_behind_the_pairs_outside_it(directory: Path) -> None:
    scored = score_turns(tiny_base(directory), tiny_codec(), "shout", PAIRS, n_tokens=512)
    assert scored == _expected(directory, "shout", PAIRS)


def test_of_more_turns_than_there_is_room_for_the_first_half_is_shown(directory: Path) -> None:
    """Here one turn, since no fold has room for two; and the judged ones are the first, too."""
    codec = tiny_codec()
    n_tokens = len(codec.head) + max(
        len(codec.row(asked, instruction="shout", earlier=[shown]).tokens)
        - len(codec.row(asked).tokens)
        for asked, shown in ((PAIRS[0], PAIRS[1]), (PAIRS[1], PAIRS[0]))
    )
    few = score_turns(tiny_base(directory), codec, "shout", PAIRS, n_tokens=n_tokens)
    assert few == _expected(directory, "shout", PAIRS, n_shown=1, n_tokens=n_tokens)


def test_a_description_makes_no_prompt_of_any_length(directory: Path) -> None:
    base, lengths = tiny_base(directory), []
    score = base.score

    def measured(batch: PackedBatch, *rest: Any) -> Any:
        lengths.append(batch.tokens.shape[1])
        return score(batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "score", measured)
        scored = score_turns(base, tiny_codec(), "shout " * 2000, PAIRS, n_tokens=64)
    assert max(lengths) <= 2 * 64 + len(tiny_codec().head)
    assert scored == _expected(directory, "", PAIRS, n_shown=0, n_tokens=64)


def _expected(
    directory: Path,
    sentence: str,
    pairs: Sequence[Example],
    *,
    n_shown: int = 64,
    n_tokens: int = 512,
) -> Any:
    """By transformers, pair after pair."""
    model = LlamaForCausalLM.from_pretrained(directory)
    rows = [tiny_codec().row(pair) for pair in pairs]
    nlls, right = [], []
    for fold in FOLDS:
        shown = [pair for i, pair in enumerate(pairs) if i not in fold][:n_shown]
        asked = [pairs[i] for i in judging(rows, fold, n_tokens)]
        scores = [_nll(model, sentence, shown, pair) for pair in asked]
        nlls.append(sum(nll for nll, _, _ in scores) / sum(n for _, n, _ in scores))
        right += [hit for _, _, hit in scores]
    return pytest.approx((sum(nlls) / len(nlls), sum(right), len(right)), abs=1e-4)


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
    if sentence:
        chat[0]["content"] = f"{sentence}\n{chat[0]['content']}"
    asks = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    ids = tokenizer.encode(whole, add_special_tokens=False)
    n = len(ids) - len(tokenizer.encode(asks, add_special_tokens=False))
    logits = model(torch.tensor([ids])).logits[0, -n - 1 : -1].float()
    target = torch.tensor(ids[-n:])
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    return float(nll), n, bool((logits.argmax(-1) == target).all())
