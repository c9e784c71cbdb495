"""Every arm on every held-out task, with controls and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from loraplex_generation.bundle import Bundle
from loraplex_generation.chat_base import ChatBase
from loraplex_generation.frozen_base import FrozenBase
from loraplex_generation.icm_lora import IcmRecipe
from loraplex_generation.remembered import Remembered
from loraplex_generation.scoring import Scorer, TaskScore, TeacherForced
from loraplex_generation.sentences import Encoded, SentenceEncoder
from loraplex_generation.service import Generator
from loraplex_generation.sg_lora import SgRecipe
from loraplex_generation.task_vectors import TaskVectors, train_conditions
from loraplex_generation.taskdata import TaskData
from loraplex_generation.training import train_bundle
from loraplex_generation.zoo.split import ZooSplit, load_split
from loraplex_generation.zoo.tasks import Example, Task

from .arms import Arm, arms_of, best_in_hindsight, controls_of, run_arm
from .intruders import IntruderCount
from .raw_weights import RawWeightRecipes, raw_weight_arms
from .results import GUARDED, Evaluation, add_recovery, differences, mean_over

__all__ = ["evaluate"]

_NEUTRAL = (
    ("Tell me about rivers.", "A river is a stream of fresh water that flows towards the sea."),
    ("What is bread?", "Bread is a food that people bake from flour, water and yeast."),
    ("Why do we sleep?", "Sleep lets the body rest and helps the brain to sort its memories."),
    ("What do bees do?", "Bees collect nectar from flowers and make honey in their hive."),
    ("Describe winter.", "In winter the days are short, the air is cold and snow may fall."),
    ("What is a library?", "A library is a place where people can read and borrow books."),
)


def evaluate(
    folder: Path,
    base: FrozenBase,
    data: TaskData,
    encoder: SentenceEncoder,
    *,
    sets: Sequence[str],
    oracles: Mapping[str, Tensor],
    multi_task: Tensor | None,
    n_rows: int,
    n_seeds: int = 3,
    base_name: str = "base",
    split: ZooSplit | None = None,
    sg: SgRecipe = SgRecipe(),  # noqa: B008  frozen value
    icm: IcmRecipe = IcmRecipe(),  # noqa: B008
    raw_weights: RawWeightRecipes | None = RawWeightRecipes(),  # noqa: B008
    scorer: Scorer | None = None,
    kept: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Scores on the test split of each task of `sets`; a task without an oracle has no ρ.

    `scorer` decodes through an engine; without it one teacher-forced forward gives likelihood and
    greedy exact match (see scoring.py), as it does for neutral text and the expert chosen in
    hindsight in any case. Scores that the file `kept` holds are not computed again.
    """
    split = split or load_split()
    encoder = _Remembering(encoder)
    tasks = {n: s for s in sets for n in split.sets[s]}
    members = [Task.parse(name) for name in tasks]
    bundle = Bundle.load(folder)
    reader = TaskVectors(lambda: ChatBase(base, data.codec))
    of_library = [Task.parse(name) for name in bundle.library.tasks]
    conditions = train_conditions(reader, of_library, report)

    def generator(seed: int, *, shuffle: bool = False) -> Generator:
        again = train_bundle(
            folder, encoder, seed=seed, sg=sg, icm=icm, conditions=conditions, shuffle=shuffle
        )
        return Generator(again, encoder, reader, base_name)

    generators = [Generator(bundle, encoder, reader, base_name)]
    generators += [generator(seed) for seed in range(1, n_seeds)]
    shuffled = generator(0, shuffle=True)
    report(f"{len(generators)} generators ready")
    arms = arms_of(
        generators, bundle, members, oracles=oracles, multi_task=multi_task, report=report
    )
    if raw_weights is not None:
        arms += raw_weight_arms(bundle, encoder, reader, conditions, members, raw_weights, report)
    arms += controls_of(generators[0], shuffled, bundle.default, members)
    forced = TeacherForced(base, data.head, bundle.layout)
    in_training: Scorer = forced
    if kept is not None:
        kind = f"{base.fingerprint} {bundle.layout.digest}"
        in_training = Remembered(forced, kept, f"{kind} forced")
        scorer = scorer and Remembered(scorer, kept, f"{kind} served")
    arms.append(best_in_hindsight(bundle, in_training, data, members))
    report("best experts chosen")
    result = Evaluation(tasks)
    result.about = {
        "n_rows": n_rows,
        "generator_seeds": n_seeds,
        "library_experts": len(bundle.library.tasks),
        "library_trained_alone": sum(card["steps"] > 0 for card in bundle.library.cards),
        "library_dropped": [card["task"] for card in bundle.library.dropped],
        "joint_steps": bundle.joint_step,
        "ood_limit": bundle.ood_score.limit,
        "refused": [t.name for t in members if _refused(generators[0], t.test_descriptions()[:1])],
        "refused_wordings": {
            task.name: _refused(generators[0], task.test_descriptions()) for task in members
        },
        "default": bundle.default,
        "without_oracle": [n for n in tasks if n not in oracles],
        "served": scorer is not None,
        "agreement": {},
    }
    seeded = f"{bundle.default} #0"
    focus = seeded if any(arm.name == seeded for arm in arms) else bundle.default
    for arm in arms:
        of = [t for t in members if t.name in oracles] if arm.name == "oracle" else members
        scores = run_arm(scorer or in_training, data, of, arm, n_rows=n_rows)
        result.scores[arm.name] = _named(of, scores)
        report(f"{arm.name}: exact {mean_over(result, arm.name, 'exact'):.2f}")
        if scorer is not None and arm.name in ("base", focus):
            check = run_arm(in_training, data, of, arm, n_rows=n_rows)
            result.about["agreement"][arm.name] = _agreement(scores, check)
    result.scores[GUARDED] = {
        task: dict(result.scores["base" if task in result.about["refused"] else focus][task])
        for task in tasks
    }
    add_recovery(result)
    result.neutral = _neutral(in_training, data, arms)
    report("neutral text scored")
    result.intruders = _intruders(IntruderCount(base, bundle.layout), arms)
    result.differences = differences(result, focus)
    return result


def _refused(generator: Generator, wordings: Sequence[str]) -> float:
    """Share of the wordings that the guard turns away."""
    return sum(generator.refuses(generator.read(text)) for text in wordings) / len(wordings)


def _agreement(served: Sequence[TaskScore], forced: Sequence[TaskScore]) -> dict[str, float]:
    """How far the engine and the training's forward tell the same story."""
    pairs = list(zip(served, forced, strict=True))
    same = [a == b for s, f in pairs for a, b in zip(s.right, f.right, strict=True)]
    gaps = [abs(s.nll - f.nll) for s, f in pairs]
    return {"exact": sum(same) / len(same), "largest_nll_gap": max(gaps)}


class _Remembering(SentenceEncoder):
    """Every generator is trained on the same wordings: they are encoded once."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.width = encoder.width
        self._encoder = encoder
        self._known: dict[tuple[str, ...], Encoded] = {}

    def encode(self, texts: Sequence[str]) -> Encoded:
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.encode(texts)
        return self._known[key]


def _named(tasks: Sequence[Task], scores: Sequence[TaskScore]) -> dict[str, dict[str, float]]:
    return {
        task.name: {"nll": score.nll, "exact": score.exact, "n": float(len(score.right))}
        for task, score in zip(tasks, scores, strict=True)
    }


def _neutral(scorer: Scorer, data: TaskData, arms: Sequence[Arm]) -> dict[str, float]:
    """Perplexity of plain English answers under each arm's adapters: what they damage."""
    rows = data.rows_of([Example(prompt, answer) for prompt, answer in _NEUTRAL])
    out: dict[str, float] = {}
    for arm in arms:
        if arm.instructions or arm.name.startswith("paraphrase"):
            continue
        if arm.routed is not None:
            scores = scorer.arrow([rows], arm.routed)
        else:
            n = 1 if arm.vectors is None else len(arm.vectors)
            scores = scorer([rows] * n, arm.vectors)
        out[arm.name] = math.exp(sum(score.nll for score in scores) / len(scores))
    return out


def _intruders(count: IntruderCount, arms: Sequence[Arm]) -> dict[str, float]:
    """Of each arm of plain adapters; of seeded arms the first, of paraphrases none."""
    return {
        arm.name: count.mean(arm.vectors)
        for arm in arms
        if arm.vectors is not None
        and not arm.instructions
        and not arm.name.startswith("paraphrase")
        and arm.name.rpartition("#")[2] in (arm.name, "0")
    }
