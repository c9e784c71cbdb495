"""What a few examples give on the validation tasks of the zoo, by recipe and number of examples.

    python adapter_store/benchmarks/refinement.py [--pairs 4 8 16] [--draws 2] [--out FILE]

No test task is read. Each run draws its pairs from the task's training inputs, learns from them as
`generate_from_examples` does, and is scored on inputs of the validation split that no run learns
from. Runs are kept in the file as they end, and those that it has are not run again, so a stopped
measurement goes on where it was. Prints Markdown: a row for each recipe and number of pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraplex_generation.chat_base import ChatBase
from loraplex_generation.errors import NothingLearnt
from loraplex_generation.from_examples import generate_from_examples
from loraplex_generation.refinement import RefinementRecipe
from loraplex_generation.scoring import TaskScore, TeacherForced
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.service import Generator
from loraplex_generation.shipped import shipped_folder
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task
from loraplex_server.model.pull import DEFAULT_BASE, resolve_encoder, resolve_model

OUT = Path(__file__).with_name("refinement.json")
N_UNSEEN = 24
# What differs from the default recipe.
GRID: tuple[dict[str, float], ...] = (
    {},
    {"steps": 12},
    {"steps": 28},
    {"lr": 6e-3},
    {"lr": 1.5e-3},
    {"span_steps": 0},
)
Run = dict[str, Any]  # JSON


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=load_split().sets["validation"])
    parser.add_argument("--recipes", type=int, nargs="+", default=range(len(GRID)))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Run] = json.loads(options.out.read_text()) if options.out.is_file() else []
    bench = Bench()
    wanted = itertools.product(range(options.draws), options.pairs, options.recipes, options.tasks)
    for draw, k, recipe, task in wanted:
        asked = {"task": task, "pairs": k, "draw": draw, "recipe": GRID[recipe]}
        if any(asked.items() <= run.items() for run in runs):
            continue
        runs.append({**asked, **bench.run(task, k, draw, GRID[recipe])})
        print(json.dumps(runs[-1]), flush=True)
        options.out.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    print("\n".join(table(runs)))


class Bench:
    def __init__(self) -> None:
        directory = resolve_model(None)
        self._base, self._codec = ChatBase.of_directory(directory)
        self._generator = Generator.load(
            shipped_folder(),
            SentenceEncoder(resolve_encoder()),
            base_name=DEFAULT_BASE,
            base_directory=directory,
        )

    def run(self, name: str, k: int, draw: int, changes: dict[str, float]) -> Run:
        task = Task.parse(name)
        sentence = task.test_descriptions()[0]
        draft = self._generator.generate(sentence, force=True)
        score = TeacherForced(self._base, self._codec.head, draft.layout)
        unseen = [self._codec.row(each) for each in task.examples("validation", N_UNSEEN)]
        try:
            made = generate_from_examples(
                self._generator,
                self._base,
                self._codec,
                sentence,
                task.examples("train", k, seed=draw),
                recipe=replace(RefinementRecipe(), **changes),  # type: ignore[arg-type]
            )
            refinement, vector = made.card["refinement"], made.vector
            assert isinstance(refinement, dict)
            told = {key: value for key, value in refinement.items() if key != "seconds"}
        except NothingLearnt:
            told, vector = {"gained": False}, self._generator.library_mean()
        return {
            "refused": self._generator.refuses(self._generator.read(sentence)),
            "draft": _shown(score([unseen], draft.vector[None])[0]),
            "learnt": _shown(score([unseen], vector[None])[0]),
            "refinement": told,
        }


def _shown(score: TaskScore) -> dict[str, float]:
    return {"exact": round(score.exact, 4), "nll": round(score.nll, 4)}


def table(runs: Sequence[Run]) -> Iterator[str]:
    yield "| recipe | pairs | runs | draft exact | learnt exact | draft nll | learnt nll |"
    yield "| --- " * 7 + "|"
    key = lambda run: (json.dumps(run["recipe"]), run["pairs"])  # noqa: E731
    for (recipe, k), group in itertools.groupby(sorted(runs, key=key), key):
        these = list(group)

        def mean(of: str, what: str, these: Sequence[Run] = these) -> float:
            return sum(float(run[of][what]) for run in these) / len(these)

        exact = " | ".join(f"{mean(of, 'exact'):.0%}" for of in ("draft", "learnt"))
        nll = " | ".join(f"{mean(of, 'nll'):.2f}" for of in ("draft", "learnt"))
        yield f"| {recipe} | {k} | {len(these)} | {exact} | {nll} |"


if __name__ == "__main__":
    main()
