"""`loraplex generator eval`: every arm on every held-out task, with controls and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .arms import Arm, arms_of, controls_of, run_arm
from .bundle import Bundle
from .frozen_base import BOnlyLora, FrozenBase
from .retrieval import condition
from .scoring import TaskScore, score_groups
from .sentences import Encoded, SentenceEncoder
from .service import Generator
from .sg_lora import LITERAL, SgRecipe, train_sg_lora
from .statistics import paired_difference, recovery
from .taskdata import TaskData
from .training import Wordings, train_bundle
from .zoo.split import ZooSplit, load_split
from .zoo.tasks import Example, Task

__all__ = ["Evaluation", "best_method", "evaluate", "mean_over"]

_RIVALS = (
    "base",
    "base + description",
    "base + 3-shot",
    "nearest",
    "weighted",
    "multi-task + description",
    "control: wrong description",
    "control: random string",
)
_NEUTRAL = (
    ("Tell me about rivers.", "A river is a stream of fresh water that flows towards the sea."),
    ("What is bread?", "Bread is a food that people bake from flour, water and yeast."),
    ("Why do we sleep?", "Sleep lets the body rest and helps the brain to sort its memories."),
    ("What do bees do?", "Bees collect nectar from flowers and make honey in their hive."),
    ("Describe winter.", "In winter the days are short, the air is cold and snow may fall."),
    ("What is a library?", "A library is a place where people can read and borrow books."),
)


@dataclass(slots=True)
class Evaluation:
    """JSON-ready. `scores`: arm → task → {nll, exact, rho}."""

    tasks: dict[str, str]  # task → set
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    differences: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    neutral: dict[str, float] = field(default_factory=dict)  # arm → perplexity on plain English
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


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
    literal: SgRecipe | None = LITERAL,
    report: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Scores on the test split of each task of `sets`; a task without an oracle has no ρ.

    One teacher-forced forward gives likelihood and greedy exact match (see scoring.py).
    """
    split = split or load_split()
    encoder = _Remembering(encoder)
    tasks = {n: s for s in sets for n in split.sets[s]}
    members = [Task.parse(name) for name in tasks]
    bundle = Bundle.load(folder)
    generators = [Generator(bundle, encoder, base_name)]
    for seed in range(1, n_seeds):
        again = train_bundle(folder, encoder, seed=seed, sg=sg, icm=None)
        generators.append(Generator(again, encoder, base_name))
    shuffled = Generator(
        train_bundle(folder, encoder, sg=sg, icm=None, shuffle=True), encoder, base_name
    )
    report(f"{len(generators)} generators ready")
    arms = arms_of(
        generators, bundle, base, members, oracles=oracles, multi_task=multi_task, report=report
    )
    if literal is not None:
        arms.append(_literal_arm(bundle, encoder, members, literal))
        report("literal SG-LoRA trained")
    arms += controls_of(generators[0], shuffled, bundle.default, members)
    result = Evaluation(tasks)
    result.about = {
        "n_rows": n_rows,
        "generator_seeds": n_seeds,
        "library_experts": len(bundle.library.tasks),
        "library_trained_alone": sum(card["steps"] > 0 for card in bundle.library.cards),
        "library_dropped": [card["task"] for card in bundle.library.dropped],
        "joint_steps": bundle.joint_step,
        "refused": [
            task.name
            for task in members
            if generators[0].refuses(generators[0].encode(task.test_descriptions()[0]))
        ],
        "default": bundle.default,
        "without_oracle": [n for n in tasks if n not in oracles],
    }
    for arm in arms:
        of = [t for t in members if t.name in oracles] if arm.name == "oracle" else members
        scores = run_arm(base, data, bundle, of, arm, split="test", n_rows=n_rows)
        result.scores[arm.name] = _named(of, scores)
        report(f"{arm.name}: exact {mean_over(result, arm.name, 'exact'):.2f}")
    _add_recovery(result)
    result.neutral = _neutral(base, data, bundle, arms)
    focus = f"{bundle.default} #0" if f"{bundle.default} #0" in result.scores else bundle.default
    result.differences = _differences(result, focus)
    return result


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


def best_method(result: Evaluation, methods: Sequence[str]) -> str:
    """The method with the lowest mean NLL over the tasks of `result` (meant for validation)."""

    def loss(method: str) -> float:
        arms = [a for a in result.scores if a == method or a.startswith(f"{method} #")]
        values = [mean_over(result, arm, "nll") for arm in arms]
        return sum(values) / len(values) if values else math.inf

    return min(methods, key=loss)


def mean_over(result: Evaluation, arm: str, metric: str, of: str | None = None) -> float:
    """Mean over the tasks of one set, or of all; ρ over those that have an oracle."""
    values = [
        score[metric]
        for task, score in result.scores[arm].items()
        if (of is None or result.tasks[task] == of) and not math.isnan(score[metric])
    ]
    return sum(values) / len(values) if values else math.nan


def _literal_arm(
    bundle: Bundle, encoder: SentenceEncoder, tasks: Sequence[Task], recipe: SgRecipe
) -> Arm:
    """SG-LoRA as published: raw weights in and out. Trained for this alone: too large to ship."""
    words = Wordings(encoder, [Task.parse(name) for name in bundle.library.tasks])
    raw = bundle.span.mean + bundle.library.snapshots @ bundle.span.directions
    sentence = words.encoded.sentence
    model = train_sg_lora(raw, bundle.neighbours, sentence, words.owner, recipe)
    asked = encoder.encode([task.test_descriptions()[0] for task in tasks]).sentence
    alpha = bundle.neighbours.weights(asked)
    mu, var = condition(alpha, raw.mean(1), raw.var(1, correction=0))
    return Arm("sg-lora literal", model.generate(mu, var, asked, None))


def _named(tasks: Sequence[Task], scores: Sequence[TaskScore]) -> dict[str, dict[str, float]]:
    return {
        task.name: {"nll": score.nll, "exact": score.exact, "n": float(score.n_rows)}
        for task, score in zip(tasks, scores, strict=True)
    }


def _add_recovery(result: Evaluation) -> None:
    base, oracle = result.scores["base"], result.scores.get("oracle", {})
    for scores in result.scores.values():
        for task, score in scores.items():
            best = oracle[task]["nll"] if task in oracle else math.nan
            score["rho"] = recovery(base[task]["nll"], score["nll"], best)


def _differences(result: Evaluation, focus: str) -> dict[str, dict[str, dict[str, float]]]:
    """focus − rival, for each set of tasks and metric; NLL is negated, so that more is better."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rival in (r for r in _RIVALS if r in result.scores and r != focus):
        for of in sorted(set(result.tasks.values())):
            names = [task for task, s in result.tasks.items() if s == of]
            for metric, sign in (("nll", -1), ("exact", 1)):
                a = [sign * result.scores[focus][task][metric] for task in names]
                b = [sign * result.scores[rival][task][metric] for task in names]
                gap = paired_difference(a, b)
                found.setdefault(rival, {})[f"{of} {metric}"] = gap._asdict()
    return found


def _neutral(
    base: FrozenBase, data: TaskData, bundle: Bundle, arms: Sequence[Arm]
) -> dict[str, float]:
    """Perplexity of plain English answers under each arm's adapters: what they damage."""
    examples = [Example(prompt, answer) for prompt, answer in _NEUTRAL]
    out: dict[str, float] = {}
    for arm in arms:
        if arm.instructions or arm.name.startswith("paraphrase"):
            continue
        if arm.vectors is None:
            total = [score_groups(base, data.batch_of([examples]), arm.adapters)[0].nll]
        else:
            total = []
            for at in range(0, len(arm.vectors), 4):
                part = arm.vectors[at : at + 4]
                adapters = BOnlyLora(bundle.layout, part, base.dtype)
                batch = data.batch_of([examples] * len(part))
                total += [score.nll for score in score_groups(base, batch, adapters)]
        out[arm.name] = math.exp(sum(total) / len(total))
    return out
