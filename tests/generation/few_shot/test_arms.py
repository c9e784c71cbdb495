"""Every arm end to end, on a random base of three layers and a library trained on it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_store.benchmarks.few_shot.arms import ARMS, Asked
from adapter_store.benchmarks.few_shot.bench import Bench
from adapter_store.benchmarks.few_shot.cells import Cell, CellFile, Measured
from adapter_store.benchmarks.few_shot.lorahub import search_weights
from adapter_store.benchmarks.few_shot.measuring import Measure, held_out_tasks, measure_all
from adapter_store.benchmarks.few_shot.planning import plan, sweep
from adapter_store.benchmarks.few_shot.summary import by_recipe, plot, recipe_table, report
from loraplex_generation.chat_base import ChatBase
from loraplex_generation.decoding import greedy_reply
from loraplex_generation.experts import ExpertRecipe
from loraplex_generation.from_examples import generate_from_examples
from loraplex_generation.refinement import RefinementRecipe
from loraplex_generation.zoo.tasks import Example, Task
from tests.support.tiny_library import TINY_TASKS, tiny_library
from tests.support.tiny_zoo import (
    HashedWords,
    tiny_base,
    tiny_codec,
    tiny_directory,
    tiny_tokenizer,
)

TASKS = ("vowels/plain", "octal/quotes")
QUICK = RefinementRecipe(span_steps=1, steps=2, warmup=1, look_every=1, tokens=60, lr=0.05)
EXPERT = ExpertRecipe(max_steps=1, chunk=1, tokens_per_task=40, snapshots=2, validation_rows=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    chat = ChatBase(tiny_base(tiny_directory(folder / "base")), tiny_codec())
    encoder = HashedWords()
    library = tiny_library(folder / "library", chat, encoder)
    bench = Bench.of(chat, library, encoder, "tiny")
    return replace(bench, multi_task=bench.generator.library_mean())


def asked(task: str, n: int, *, budget_s: float = 0.0) -> Asked:
    made = Task.parse(task)
    sentence = made.test_descriptions()[0]
    return Asked(made, sentence, made.examples("train", n), QUICK, seed=0, budget_s=budget_s)


def test_every_arm_gives_a_score_for_every_k_and_a_report_of_them(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_store.benchmarks.few_shot.arms._ORACLE", EXPERT)
    cells = plan(TASKS, arms=ARMS, ks=(0, 8), n_draws=1, rows=2)
    kept = CellFile(tmp_path / "cells.jsonl")
    measure_all(Measure(bench, held_out_tasks(TASKS, 2), QUICK), cells, kept)
    assert {m.cell for m in kept} == set(cells)
    assert all(math.isfinite(m.nll) and 0 <= m.exact <= 1 for m in kept)
    text = report(list(kept), TINY_TASKS)
    for arm in ARMS:
        assert f"| {arm} |" in text
    assert "2 tasks of 2 operations" in text
    plot(list(kept), tmp_path / "plot.svg")
    assert "exact match" in (tmp_path / "plot.svg").read_text()


def test_recipes_are_compared_where_all_were_run(bench: Bench, tmp_path: Path) -> None:
    cells = sweep(TASKS, k=4, n_draws=1, rows=3, grid=({}, {"steps": 1}))
    kept = CellFile(tmp_path / "sweep.jsonl")
    measure_all(Measure(bench, held_out_tasks(TASKS, 3), QUICK), cells[:3], kept)
    found = by_recipe(kept)
    assert [score.n for score in found.values()] == [1, 1]
    assert found[()].gained == (0.0, 0.0, 0.0)
    assert "| steps 1 | 1 |" in recipe_table(kept)


def test_ours_is_what_the_server_makes_of_the_same_order(bench: Bench) -> None:
    order = asked("vowels/plain", 8)
    made = generate_from_examples(
        bench.generator,
        bench.base,
        bench.codec,
        order.sentence,
        order.examples,
        method="sg-lora",
        force=True,
        recipe=QUICK,
    )
    learnt = ARMS["sg-lora"].learn(bench, order)
    assert learnt.vector is not None
    assert torch.equal(learnt.vector, made.vector)


def test_a_refused_sentence_without_examples_is_answered_by_the_base(bench: Bench) -> None:
    strange = Asked(Task.parse("vowels/plain"), "qzx 71 vbn ###", (), QUICK, seed=0)
    learnt = ARMS["ours"].learn(bench, strange)
    assert learnt.vector is None
    assert learnt.told["refused"]
    assert ARMS["text-to-lora"].learn(bench, strange).vector is not None


def test_examples_in_the_prompt_are_what_the_rows_are_scored_under(bench: Bench) -> None:
    """By decoding the whole text, instead of the shared head that the score uses."""
    order = asked("vowels/plain", 2)
    learnt = ARMS["prompt"].learn(bench, order)
    assert all(
        e.prompt in learnt.instruction and e.answer in learnt.instruction for e in order.examples
    )
    for example in order.task.examples("validation", 3):
        whole = f"{learnt.instruction}\n{example.prompt}"
        reply = greedy_reply(bench.base, bench.codec, whole, max_tokens=6)
        told = Example(example.prompt, reply)
        if len(reply) < 6 and reply:  # else it was cut off, or has no text
            assert bench.score([told], None, learnt.instruction).exact == 1.0


def test_examples_as_turns_are_the_chat_that_a_client_would_send(bench: Bench) -> None:
    """By the tokenizer's own template, with the whole chat at once."""
    order = asked("vowels/plain", 3)
    learnt = ARMS["turns"].learn(bench, order)
    asked_now = order.task.examples("validation", 1)[0]
    row = bench.codec.row(asked_now, instruction=learnt.instruction, earlier=learnt.earlier)
    chat = []
    for number, turn in enumerate([*order.examples, asked_now]):
        led = turn.prompt if number else f"{order.sentence}\n{turn.prompt}"
        chat += [{"role": "user", "content": led}, {"role": "assistant", "content": turn.answer}]
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    whole = tokenizer.encode(text, add_special_tokens=False)
    tokens = [*bench.codec.head, *row.tokens]
    assert tokens == whole[: len(tokens)]
    assert len(whole) - len(tokens) <= 1  # the line end behind the last answer
    alone = bench.score([asked_now], None, learnt.instruction, learnt.earlier)
    assert math.isfinite(alone.nll)


def test_arms_without_draws_and_budget_are_held_against_ours_that_has_them(tmp_path: Path) -> None:
    recipe = (("steps", 36.0),)
    cells = [Cell("vowels/plain", "ours", k, 0, 2, 30.0, recipe) for k in (0, 16)]
    cells += [Cell("vowels/plain", "base", 0, 0, 2), Cell("vowels/plain", "oracle", 600, 0, 2)]
    exact = (0.25, 0.75, 0.0, 1.0)
    measured = [Measured(c, e, 1.0, 1.0, 1.0, 1.0) for c, e in zip(cells, exact, strict=True)]
    text = report(measured, TINY_TASKS)
    assert "| base | 16 | 1 | +75% " in text
    assert "| oracle | 0 | 1 | -75% " in text
    assert "| oracle | 16 | 1 | -25% " in text


def test_rows_score_the_same_in_any_company(bench: Bench) -> None:
    rows = Task.parse("octal/quotes").examples("validation", 12)
    together = bench.score(rows, None, "a shared beginning")
    apart = [bench.score([row], None, "a shared beginning") for row in rows]
    n_tokens = [bench.codec.row(row).n_answer for row in rows]
    mean = sum(a.nll * n for a, n in zip(apart, n_tokens, strict=True)) / sum(n_tokens)
    assert together.nll == pytest.approx(mean, rel=1e-4)
    assert together.right == tuple(a.right[0] for a in apart)


@pytest.mark.parametrize("arm", ["zero", "mean", "ours", "lorahub"])
def test_a_spent_budget_ends_learning(bench: Bench, arm: str) -> None:
    learnt = ARMS[arm].learn(bench, asked("vowels/plain", 4, budget_s=1e-9))
    assert learnt.told.get("tries", 1) == 1
    assert learnt.told.get("steps", 0) == 0


def test_lorahub_finds_weights_that_a_loss_wants() -> None:
    goal = torch.linspace(-1, 1, 8)

    def loss(experts: torch.Tensor, weights: torch.Tensor) -> float:
        return float((weights - goal[experts]).square().mean())

    found = search_weights(loss, 8, seed=0, n_tries=600)
    at_zero = float(goal.square().mean())
    assert found.loss < 0.3 * at_zero
    assert found.weights.abs().max() <= 1.5
    assert sorted(found.experts.tolist()) == list(range(8))
    again = search_weights(loss, 8, seed=0, n_tries=600)
    assert torch.equal(found.weights, again.weights)
