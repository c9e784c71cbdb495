"""Cells on disk, plans of them, and what a plan costs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from adapter_store.benchmarks.few_shot.arms import ARMS, ORACLE_K
from adapter_store.benchmarks.few_shot.cells import Cell, CellFile, Measured
from adapter_store.benchmarks.few_shot.measuring import measure_all
from adapter_store.benchmarks.few_shot.planning import Pace, blocks_of, fitting, plan, sweep

TASKS = ("vowels/plain", "octal/quotes", "repeat-3/sentence")


def measured(cell: Cell, *, learn_s: float = 2.0, score_s: float = 1.0) -> Measured:
    return Measured(cell, exact=0.5, nll=1.0, learn_s=learn_s, learn_cpu_s=learn_s, score_s=score_s)


def _plan(arms: tuple[str, ...] = tuple(ARMS)) -> list[Cell]:
    return plan(TASKS, arms=arms, ks=(8, 0, 2), n_draws=2, rows=10)


def test_what_a_file_holds_is_read_back_and_not_measured_again(tmp_path: Path) -> None:
    cells, asked = _plan()[:5], []

    def measure(cell: Cell) -> Measured:
        asked.append(cell)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measured(cell)

    with pytest.raises(KeyboardInterrupt):
        measure_all(measure, cells, CellFile(tmp_path / "cells.jsonl"))
    measure_all(measure, cells, CellFile(tmp_path / "cells.jsonl"))
    assert Counter(asked) == Counter({**dict.fromkeys(cells, 1), cells[2]: 2})
    assert [m.cell for m in CellFile(tmp_path / "cells.jsonl")] == cells


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    cells, path = _plan()[:2], tmp_path / "cells.jsonl"
    kept = CellFile(path)
    for cell in cells:
        kept.add(measured(cell))
    path.write_bytes(path.read_bytes()[:-9])
    again = CellFile(path)
    assert [cell in again for cell in cells] == [True, False]
    again.add(measured(cells[1]))
    assert len(CellFile(path)) == 2


def test_recipes_are_part_of_what_a_cell_is(tmp_path: Path) -> None:
    cells = sweep(TASKS, k=8, n_draws=1, rows=10, grid=({}, {"lr": 6e-3, "steps": 12}))
    kept = CellFile(tmp_path / "sweep.jsonl")
    kept.add(measured(cells[0]))
    kept.add(measured(cells[1]))
    again = CellFile(kept.path)
    assert len({cell.key for cell in cells}) == len(cells) == 6
    assert cells[1] in again
    assert cells[2] not in again


def test_every_arm_has_every_k_that_it_can_have_and_none_is_planned_twice() -> None:
    cells = _plan()
    assert len(set(cells)) == len(cells)
    assert {c.arm for c in cells} == set(ARMS)
    assert {c.k for c in cells if c.arm == "ours"} == {0, 2, 8}
    assert {c.k for c in cells if c.arm == "zero"} == {2, 8}
    assert {c.k for c in cells if c.arm == "oracle"} == {ORACLE_K}
    assert {c.draw for c in cells if c.arm == "oracle"} == {0}
    assert {c.draw for c in cells if c.k == 0} == {0}
    assert {c.draw for c in cells if c.arm == "lorahub"} == {0, 1}


def test_a_block_compares_all_arms_on_the_same_examples() -> None:
    first = blocks_of(_plan())[0]
    assert {(c.task, c.k, c.draw) for c in first} == {(first[0].task, 8, 0)}
    assert {c.arm for c in first} == {a for a, arm in ARMS.items() if 8 in arm.ks}


def test_a_plan_costs_what_was_measured_and_fits_into_minutes(tmp_path: Path) -> None:
    kept = CellFile(tmp_path / "cells.jsonl")
    cells = _plan(("ours", "prompt"))
    block = blocks_of(cells)[0]
    for cell in block:
        kept.add(measured(cell, learn_s=4.0, score_s=1.0))
    pace = Pace(kept)
    assert pace.total(block) == pytest.approx(10.0)
    assert fitting(cells, kept, 0.0) == block  # what is kept costs nothing
    assert fitting(cells, kept, 10.1) == [*block, *blocks_of(cells)[1]]
    assert fitting(cells, kept, 9.9) == block
    assert fitting(cells, kept, 1e9) == cells


def test_a_budget_bounds_the_guess_for_learning(tmp_path: Path) -> None:
    pace = Pace(CellFile(tmp_path / "none.jsonl"))
    cell = Cell("vowels/plain", "ours", 8, 0, rows=1)
    bounded = Cell("vowels/plain", "ours", 8, 0, rows=1, budget_s=5.0)
    assert pace.seconds(cell) - pace.seconds(bounded) == pytest.approx(40.0)
