"""What an evaluation found: scores by arm and task, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loraplex_generation.zoo.tasks import Task

from .statistics import paired_difference, recovery

__all__ = ["GUARDED", "Evaluation", "add_recovery", "best_method", "differences", "mean_over"]

GUARDED = "auto behind the guard"  # where the guard refuses the description, the base answers
_RIVALS = (
    "base",
    "base + description",
    "base + 3-shot",
    "nearest",
    "weighted",
    "analogy",
    "mlp #0",
    "sg-lora #0",
    "icm-lora #0",
    "multi-task + description",
    "control: wrong description",
    "control: random string",
)


@dataclass(slots=True)
class Evaluation:
    """JSON-ready. `scores`: arm → task → {nll, exact, rho}."""

    tasks: dict[str, str]  # task → set
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    differences: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    neutral: dict[str, float] = field(default_factory=dict)  # arm → perplexity on plain English
    intruders: dict[str, float] = field(default_factory=dict)  # arm → of ten directions a module
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def best_method(result: Evaluation, methods: Sequence[str]) -> str:
    """The method with the highest mean ρ over the tasks of `result` (meant for validation).

    A mean of nats would let one hard task decide. Without any oracle it has to: the lowest NLL.
    """
    has_oracle = any(not math.isnan(score["rho"]) for score in result.scores["base"].values())

    def loss(method: str) -> float:
        arms = [a for a in result.scores if a == method or a.startswith(f"{method} #")]
        if not arms:
            return math.inf
        if has_oracle:
            return -sum(mean_over(result, arm, "rho") for arm in arms) / len(arms)
        return sum(mean_over(result, arm, "nll") for arm in arms) / len(arms)

    return min(methods, key=loss)


def mean_over(result: Evaluation, arm: str, metric: str, of: str | None = None) -> float:
    """Mean over the tasks of one set, or of all; ρ over those that have an oracle."""
    values = [
        score[metric]
        for task, score in result.scores[arm].items()
        if (of is None or result.tasks[task] == of) and not math.isnan(score[metric])
    ]
    return sum(values) / len(values) if values else math.nan


def add_recovery(result: Evaluation) -> None:
    base, oracle = result.scores["base"], result.scores.get("oracle", {})
    for scores in result.scores.values():
        for task, score in scores.items():
            best = oracle[task]["nll"] if task in oracle else math.nan
            score["rho"] = recovery(base[task]["nll"], score["nll"], best)


def differences(result: Evaluation, focus: str) -> dict[str, dict[str, dict[str, float]]]:
    """focus − rival, for each set of tasks and metric; NLL is negated, so that more is better.

    Tasks of one operation are one cluster.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rival in (r for r in _RIVALS if r in result.scores and r != focus):
        for of in sorted(set(result.tasks.values())):
            names = [task for task, s in result.tasks.items() if s == of]
            for metric, sign in (("nll", -1), ("exact", 1)):
                a = [sign * result.scores[focus][task][metric] for task in names]
                b = [sign * result.scores[rival][task][metric] for task in names]
                gap = paired_difference(a, b, [Task.parse(name).operation for name in names])
                found.setdefault(rival, {})[f"{of} {metric}"] = gap._asdict()
    return found
