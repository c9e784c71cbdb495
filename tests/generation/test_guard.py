"""The guard: what a description is compared with, and how its limit is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from loraplex_generation.guard import OodDetector, as_new
from loraplex_generation.zoo.short_wordings import short_wordings
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task
from tests.support.tiny_zoo import HashedWords

TASKS = [Task.parse(name) for name in load_split().sets["train"]]
TEXTS = [wording for task in TASKS for wording in task.descriptions()]
PHRASES = [phrases for task in TASKS for phrases in task.phrases()]
OPERATIONS = [task.operation for task in TASKS for _ in task.phrases()]


def _fitted(*, quantile: float = 0.95) -> OodDetector:
    sentences = HashedWords().encode(TEXTS).sentence
    return OodDetector.fit(sentences, OPERATIONS, PHRASES, quantile=quantile)


def test_unrelated_text_is_refused_and_most_training_wordings_are_not() -> None:
    guard, encoder = _fitted(), HashedWords()
    odd = encoder.encode(["zebras quietly juggle purple thunder"]).sentence
    assert float(guard.score(odd)) > guard.limit
    assert (guard.score(encoder.encode(TEXTS).sentence) > guard.limit).float().mean() < 0.05


def test_a_known_format_does_not_make_a_new_operation_known() -> None:
    axes = torch.eye(8)
    known, dressings, new = axes[:4], axes[4:7], axes[7]
    sentences = F.normalize((known[:, None] + 2 * dressings).flatten(0, 1), dim=-1)
    guard = OodDetector.without_limit(sentences, [op for op in "abcd" for _ in dressings])
    wish = F.normalize(new + 2 * dressings[:1], dim=-1)
    assert (wish @ sentences.T).amax() > 0.79
    assert float(guard.score(wish)) > 0.4
    again = F.normalize(known + 2 * dressings[:1] + 0.1 * new, dim=-1)
    assert guard.score(again).max() < 0.2


def test_a_higher_quantile_refuses_less() -> None:
    assert _fitted(quantile=0.5).limit < _fitted(quantile=0.99).limit


def test_every_wording_is_asked_once_and_shares_no_phrase_with_what_is_seen() -> None:
    asked_of = torch.zeros(len(TEXTS), dtype=torch.int64)
    for asked, seen in as_new(OPERATIONS, PHRASES):
        asked_of[asked] += 1
        known = {PHRASES[i] for i in seen.tolist()}
        new = {PHRASES[i] for i in asked.tolist()}
        assert not {wish for wish, _ in known} & {wish for wish, _ in new}
        assert not {dress for _, dress in known if dress} & {dress for _, dress in new}
        assert {OPERATIONS[i] for i in asked.tolist()} <= {OPERATIONS[i] for i in seen.tolist()}
    assert (asked_of == 1).all()


def test_short_wordings_name_the_operation_its_language_and_the_format() -> None:
    tasks = [Task.parse(name) for name in ("card.de/plain", "past/caps", "plural/json")]
    found = short_wordings(tasks)
    assert found == short_wordings(tasks)
    assert {wording.task for wording in found} == {0, 1, 2}
    for wording in found:
        task, (phrase, suffix) = tasks[wording.task], wording.phrases
        assert (phrase, suffix) in task.phrases()
        assert suffix.strip(" ,.").lower() in wording.text
        assert ("German" in wording.text) == (task.language == "de")
        assert set(phrase.lower().split()) & set(wording.text.replace(",", "").split())
