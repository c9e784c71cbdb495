"""Adapters that learn from a few pairs, judged by pairs they have not seen."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_generation.errors import OutOfTime
from loraplex_generation.frozen_base import FrozenBase
from loraplex_generation.judged_pairs import HeldOut, JudgedPairs
from loraplex_generation.layout import AdapterLayout
from loraplex_generation.library import Subspace
from loraplex_generation.packing import PackedBatch, Row
from loraplex_generation.refinement import (
    Refinement,
    RefinementProgress,
    RefinementRecipe,
    refine,
)
from loraplex_generation.scoring import TaskScore
from loraplex_generation.zoo.tasks import Example
from tests.support.tiny_zoo import tiny_base, tiny_codec, tiny_directory

RECIPE = RefinementRecipe(span_steps=2, steps=26, lr=0.2, span_lr=0.1, warmup=2, tokens=60)
WORDS = ("red", "blue", "green", "plum", "gold", "grey", "pink", "teal", "navy", "rust")


class World:
    """A tiny base, a layout over it, and the span of five random experts."""

    def __init__(self, folder: Path) -> None:
        self.base: FrozenBase = tiny_base(tiny_directory(folder))
        self.layout = AdapterLayout(self.base.shape, first_layer=1, rank=2, alpha=4.0, seed=3)
        torch.manual_seed(1)
        experts = 0.02 * torch.randn(5, self.layout.size)
        self.span = Subspace.of(experts)
        self.codec = tiny_codec()

    def rows(self, pairs: list[tuple[str, str]]) -> list[Row]:
        return [self.codec.row(Example(*pair)) for pair in pairs]

    def refine(self, pairs: list[tuple[str, str]], **options: object) -> Refinement:
        arguments = {"recipe": RECIPE, "starts": {"mean": self.span.mean}, **options}
        return refine(
            self.base,
            self.layout,
            self.span,
            self.codec.head,
            self.rows(pairs),
            **arguments,  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tiny"))


RULE = [(word, "yes") for word in WORDS]


def test_what_the_pairs_have_in_common_is_learnt_by_copies_that_have_not_seen_the_judges(
    world: World,
) -> None:
    made = world.refine(RULE[:6])
    assert made.gained
    assert made.after.nll < 0.75 * made.before.nll
    assert made.after.n == 6  # each half is judged by the other's copy
    assert not torch.equal(made.vector, world.span.mean)


def test_answers_without_a_rule_leave_the_start_as_it_was(world: World) -> None:
    torch.manual_seed(5)
    letters = [chr(97 + int(i)) for i in torch.randperm(10)]
    made = world.refine(
        [(word, letter * 3) for word, letter in zip(WORDS, letters, strict=True)],
        recipe=RefinementRecipe(span_steps=2, steps=26, lr=0.2, warmup=2, least_gain=0.5),
    )
    assert not made.gained
    assert torch.equal(made.vector, world.span.mean)
    assert made.after == made.before


def test_a_start_that_answers_every_pair_right_is_kept(world: World) -> None:
    pairs = [(word, "e") for word in WORDS]  # what the random base soon learns to say
    only_b = replace(RECIPE, a_rate=0.0, steps=120)
    start = world.refine(pairs[:6], recipe=only_b).vector
    made = refine(
        world.base,
        world.layout,
        world.span,
        world.codec.head,
        world.rows(pairs[:8]),
        {"mean": world.span.mean, "draft": start},
        recipe=only_b,
    )
    assert (made.start, made.start_is_right, made.steps) == ("draft", True, 0)
    assert made.before.exact < made.after.exact == made.after.n  # than the first of the starts
    assert not made.gained
    assert not made.timed_out
    assert torch.equal(made.vector, start)
    assert not world.refine(pairs[:6], recipe=only_b).start_is_right


def test_the_same_pairs_give_the_same_bits(world: World) -> None:
    first, second = world.refine(RULE[:4]), world.refine(RULE[:4])
    assert torch.equal(first.vector, second.vector)
    assert first.steps == second.steps


def test_a_spent_budget_begins_no_second_step(world: World) -> None:
    seen: list[RefinementProgress] = []
    made = world.refine(RULE, deadline=time.monotonic(), report=seen.append)
    assert [(now.stage, now.step) for now in seen] == [("choosing a start", 0), ("training", 0)]
    assert not made.gained
    assert made.timed_out


def test_what_a_report_raises_ends_the_work_at_that_step(world: World) -> None:
    seen: list[RefinementProgress] = []

    def stop(progress: RefinementProgress) -> None:
        seen.append(progress)
        if progress.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        world.refine(RULE, report=stop)
    assert [now.step for now in seen] == [0, 0, 1, 2, 3]
    assert seen[0].held_out_nll is None
    assert seen[-1].held_out_nll is not None


def test_no_score_takes_more_tokens_than_the_recipe_allows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 pairs of 500 tokens in one forward would take gigabytes."""
    lengths: list[int] = []
    score = FrozenBase.score

    def measured(self: FrozenBase, batch: PackedBatch, *rest: Any) -> Any:
        lengths.append(batch.tokens.shape[1])
        return score(self, batch, *rest)

    monkeypatch.setattr(FrozenBase, "score", measured)
    recipe = replace(RECIPE, tokens=60, judge_tokens=90, span_steps=1, steps=1, warmup=1)
    pairs = [(f"{word} {other}", "yes") for word in WORDS for other in WORDS[:4]]
    starts = dict.fromkeys(("draft", "mean", "reading"), world.span.mean)
    world.refine(pairs, recipe=recipe, starts=starts)
    assert max(lengths) <= 90 + len(world.codec.head)


def test_the_likelier_start_is_taken(world: World) -> None:
    learnt = world.refine(RULE[:6], recipe=replace(RECIPE, a_rate=0.0)).vector
    made = refine(
        world.base,
        world.layout,
        world.span,
        world.codec.head,
        world.rows(RULE),
        {"mean": world.span.mean, "learnt": learnt},
        recipe=RECIPE,
    )
    assert made.start == "learnt"


@pytest.mark.parametrize(
    ("scores", "way"),  # of the start, and of the whole way, half and a quarter of it
    [
        ([(2.0, 1), (0.5, 2), (0.4, 2), (0.38, 2)], 1.0),  # a shorter way is not clearly better
        ([(2.0, 1), (0.5, 2), (0.3, 2), (0.25, 2)], 0.5),  # it is likelier by more than 30 %
        ([(2.0, 1), (3.0, 0), (4.0, 1), (2.5, 2)], 0.25),  # one more is right
        ([(2.0, 1), (0.1, 0), (1.95, 1), (1.92, 1)], None),  # nothing is better than the start
        ([(2.0, 1), (2.05, 1), (1.85, 1), (1.9, 1)], None),  # what is taken is not
    ],
)
def test_the_judges_choose_how_much_of_the_way_is_kept(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[tuple[float, int]],
    way: float | None,
) -> None:
    whole = world.refine(RULE[:4], recipe=replace(RECIPE, shorter_ways=()))
    assert whole.way == 1.0
    judged = iter(HeldOut(nll, exact, 2) for nll, exact in scores)
    monkeypatch.setattr(JudgedPairs, "held_out", lambda *_: next(judged))
    made = world.refine(RULE[:4], recipe=replace(RECIPE, look_every=1000))
    start = world.span.mean
    if way is None:
        assert (made.way, made.steps, made.timed_out) == (0.0, 0, False)
        assert torch.equal(made.vector, start)
        return
    assert (made.way, made.steps) == (way, RECIPE.n_steps)
    assert made.after == HeldOut(*scores[1:][[1.0, 0.5, 0.25].index(way)], 2)
    padded = torch.nn.functional.pad(start, (0, len(whole.vector) - len(start)))
    torch.testing.assert_close(made.vector, padded + way * (whole.vector - padded))


@pytest.mark.parametrize(
    ("scores", "gained"),  # of the first start and the second, then of the whole way
    [([(1.0, 2), (2.0, 1), (1.5, 2)], False), ([(1.0, 2), (2.0, 1), (0.9, 2)], True)],
)
def test_what_is_trained_has_to_beat_the_first_start_as_well(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[tuple[float, int]],
    gained: bool,
) -> None:
    likelier = world.refine(RULE[:6], recipe=replace(RECIPE, a_rate=0.0, steps=8)).vector
    judged = iter(HeldOut(nll, exact, 2) for nll, exact in scores)
    monkeypatch.setattr(JudgedPairs, "held_out", lambda *_: next(judged))
    made = world.refine(
        RULE[:4],
        starts={"draft": world.span.mean, "mean": likelier},
        recipe=replace(RECIPE, look_every=1000, shorter_ways=()),
    )
    assert (made.start, made.gained) == ("mean", gained)
    assert made.before == HeldOut(1.0, 2, 2)


def test_only_two_starts_are_tried_where_time_is_short(world: World) -> None:
    pairs = [(word, "e") for word in WORDS[:6]]
    right = world.refine(pairs, recipe=replace(RECIPE, a_rate=0.0, steps=120)).vector
    made = [
        world.refine(
            pairs,
            starts={"draft": world.span.mean, "mean": world.span.mean, "reading": right},
            recipe=replace(RECIPE, choosing_share=share, judged_steps=0),
            deadline=time.monotonic() + 600,
        )
        for share in (0.0, 1.0)
    ]
    assert [each.start for each in made] == ["draft", "reading"]
    assert [each.timed_out for each in made] == [True, False]


def test_a_third_start_has_to_get_every_pair_right(world: World) -> None:
    pairs = [(word, "e") for word in WORDS[:6]]
    most = world.refine(pairs, recipe=replace(RECIPE, a_rate=0.0, steps=120)).vector
    pairs[-1] = (WORDS[5], "o")
    starts = {"draft": world.span.mean, "mean": world.span.mean, "reading": most}
    recipe = replace(RECIPE, few_tokens=1)  # the first pair
    assert world.refine(pairs, starts=starts, recipe=recipe).start == "draft"
    assert world.refine(pairs, starts={"draft": world.span.mean, "mean": most}).start == "mean"


@pytest.mark.parametrize(("n", "judge_tokens"), [(3, 1024), (6, 30)])
def test_a_third_start_needs_four_pairs_that_are_scored(
    world: World, n: int, judge_tokens: int
) -> None:
    pairs = [(word, "e") for word in WORDS[:6]]
    right = world.refine(pairs, recipe=replace(RECIPE, a_rate=0.0, steps=120)).vector
    starts = {"draft": world.span.mean, "mean": world.span.mean, "reading": right}
    recipe = replace(RECIPE, judge_tokens=judge_tokens, judged_steps=0)
    made = world.refine(pairs[:n], starts=starts, recipe=recipe)
    assert (made.start, made.timed_out) == ("draft", False)
    starts = {"draft": world.span.mean, "mean": right}
    made = world.refine(pairs[:n], starts=starts, recipe=recipe)
    assert (made.start, made.start_is_right) == ("mean", n == 3)  # all three, or two of six


def test_the_start_that_is_known_stays_where_the_base_breaks_off_the_choice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, n_scored = JudgedPairs.score, 0

    def cut_off(self: JudgedPairs, start: torch.Tensor) -> TaskScore:
        nonlocal n_scored
        n_scored += 1
        if n_scored == 2:
            raise TimeoutError
        return score(self, start)

    monkeypatch.setattr(JudgedPairs, "score", cut_off)
    starts = {"draft": world.span.mean, "mean": world.span.mean}
    made = world.refine(RULE[:4], starts=starts, recipe=replace(RECIPE, judged_steps=0))
    assert (made.start, made.timed_out) == ("draft", True)


@pytest.mark.parametrize(("n_looks", "gained"), [(1, False), (2, True)])
def test_a_look_back_that_the_base_breaks_off_is_time_that_was_too_short(
    world: World, monkeypatch: pytest.MonkeyPatch, n_looks: int, gained: bool
) -> None:
    held_out, looked = JudgedPairs.held_out, 0

    def cut_off(self: JudgedPairs, copies: torch.Tensor) -> HeldOut:
        nonlocal looked
        looked += 1
        if looked > n_looks:
            raise TimeoutError
        return held_out(self, copies)

    monkeypatch.setattr(JudgedPairs, "held_out", cut_off)
    recipe = replace(RECIPE, judged_steps=27, look_every=24 if gained else 1000)
    made = world.refine(RULE[:4], recipe=recipe)
    assert (made.gained, made.timed_out) == (gained, True)
    assert made.way == (1.0 if gained else 0.0)


def test_judges_that_agree_leave_the_rest_of_the_steps_to_the_copy_that_saw_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_copies: list[int] = []
    score = FrozenBase.score

    def measured(self: FrozenBase, batch: PackedBatch, *rest: Any) -> Any:
        if torch.is_grad_enabled():
            n_copies.append(len(batch.tokens))
        return score(self, batch, *rest)

    monkeypatch.setattr(FrozenBase, "score", measured)
    made = world.refine(RULE[:6], recipe=replace(RECIPE, judged_steps=8))
    assert (made.steps, made.n_steps, made.timed_out) == (28, 28, False)
    assert n_copies == [3] * 8 + [1] * 20
    assert len(made.vector) == world.layout.full_size


@pytest.mark.parametrize("n_steps", [8, 20])
def test_a_step_that_the_base_breaks_off_is_none(
    world: World, monkeypatch: pytest.MonkeyPatch, n_steps: int
) -> None:
    """As one that serves, too, does at the deadline; in the judges' part and after it."""
    n_begun = 0
    score = FrozenBase.score

    def cut_off(self: FrozenBase, *batch: Any) -> Any:
        nonlocal n_begun
        n_begun += torch.is_grad_enabled()
        if n_begun > n_steps:
            raise TimeoutError
        return score(self, *batch)

    monkeypatch.setattr(FrozenBase, "score", cut_off)
    made = world.refine(RULE[:6], recipe=replace(RECIPE, judged_steps=12))
    assert (made.steps, made.n_steps, made.timed_out) == (n_steps, 28, True)
    assert torch.isfinite(made.vector).all()
    assert made.after.nll < made.before.nll


def test_no_time_for_a_first_look_is_an_error(world: World) -> None:
    def over(*_: object) -> Any:
        raise TimeoutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenBase, "score", over)
        with pytest.raises(OutOfTime, match="budget_s"):
            world.refine(RULE[:6])


def test_judges_that_disagree_end_the_work(world: World) -> None:
    torch.manual_seed(5)
    letters = [chr(97 + int(i)) * 3 for i in torch.randperm(10)]
    seen: list[RefinementProgress] = []
    made = world.refine(
        list(zip(WORDS, letters, strict=True)),
        recipe=replace(RECIPE, judged_steps=8, least_gain=0.5),
        report=seen.append,
    )
    assert not made.gained
    assert seen[-1].step == 8
    assert not made.timed_out  # more time would change nothing


def test_eight_pairs_and_more_keep_a_quarter_to_judge_by(world: World) -> None:
    assert world.refine(RULE, deadline=time.monotonic()).before.n == 3


def test_one_pair_cannot_be_learnt_and_judged(world: World) -> None:
    with pytest.raises(ValueError, match="at least two"):
        world.refine(RULE[:1])
