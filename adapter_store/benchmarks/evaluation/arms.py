"""The methods that the evaluation compares: an adapter and an instruction for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex_generation.bundle import Bundle
from loraplex_generation.scoring import Scorer, TaskScore
from loraplex_generation.service import AdapterDescription, Generator
from loraplex_generation.task_vectors import MIN_PROMPTS
from loraplex_generation.taskdata import TaskData
from loraplex_generation.zoo.tasks import Example, Task

__all__ = ["Arm", "arms_of", "best_in_hindsight", "controls_of", "run_arm"]

_N_SHOTS = 3
_CHOOSING_ROWS = 6  # of each test task, for the best expert in hindsight


@dataclass(frozen=True, slots=True)
class Arm:
    """`vectors` [n_tasks, size], or experts that all tasks are `routed` over by Arrow
    [n_experts, size]; neither is the base. `instructions` per task.
    """

    name: str
    vectors: Tensor | None = None
    routed: Tensor | None = None
    instructions: Sequence[str] = field(default_factory=tuple)


def run_arm(
    scorer: Scorer, data: TaskData, tasks: Sequence[Task], arm: Arm, *, n_rows: int
) -> list[TaskScore]:
    """One score per task."""
    rows = data.eval_rows(tasks, n_rows, split="test", instructions=arm.instructions)
    return scorer(rows, arm.vectors) if arm.routed is None else scorer.arrow(rows, arm.routed)


def best_in_hindsight(bundle: Bundle, scorer: Scorer, data: TaskData, tasks: Sequence[Task]) -> Arm:
    """The expert that suits the test rows themselves best: what no description can know."""
    experts = bundle.library.means.float()
    chosen: list[int] = []
    for rows in data.eval_rows(tasks, _CHOOSING_ROWS, split="test"):
        scores = scorer([rows] * len(experts), experts)
        chosen.append(min(range(len(scores)), key=lambda i: scores[i].nll))
    return Arm("best expert by test score", experts[chosen])


def arms_of(
    generators: Sequence[Generator],
    bundle: Bundle,
    tasks: Sequence[Task],
    *,
    oracles: Mapping[str, Tensor],
    multi_task: Tensor | None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Arm]:
    """Every arm. `generators`: the same library, trained with different seeds."""
    wordings = [task.test_descriptions()[0] for task in tasks]
    first = generators[0]
    descriptions = [first.read(wording) for wording in wordings]
    prompted = [first.read(w, prompts=_prompts(t)) for w, t in zip(wordings, tasks, strict=True)]

    def drafts(
        generator: Generator,
        method: str,
        *,
        seed: int = 0,
        sample: bool = False,
        of: Sequence[AdapterDescription] = descriptions,
    ) -> Tensor:
        return torch.stack(
            [generator.draft(asked, method, seed=seed, sample=sample).vector for asked in of]
        )

    arms = [
        Arm("base"),
        Arm("base + description", instructions=wordings),
        Arm("base + 3-shot", instructions=[_shots(task) for task in tasks]),
    ]
    for method in ("nearest", "uniform", "top-k", "weighted", "ridge", "analogy"):
        arms.append(Arm(method, drafts(first, method)))
    for i, generator in enumerate(generators):
        arms.append(Arm(f"mlp #{i}", drafts(generator, "mlp")))
        arms.append(Arm(f"sg-lora #{i}", drafts(generator, "sg-lora")))
        sampled = drafts(generator, "sg-lora", seed=i, sample=True)
        arms.append(Arm(f"sg-lora sample #{i}", sampled))
        arms.append(Arm(f"end-to-end #{i}", drafts(generator, "end-to-end")))
        if bundle.icm is not None:
            arms.append(Arm(f"icm-lora #{i}", drafts(generator, "icm-lora")))
            told = drafts(generator, "icm-lora", of=prompted)
            arms.append(Arm(f"icm-lora + prompts #{i}", told))
            sampled = drafts(generator, "icm-lora", seed=i, sample=True)
            arms.append(Arm(f"icm-lora sample #{i}", sampled))
    report("adapters drafted")
    arms.append(Arm("arrow", routed=bundle.library.means.float()))
    if multi_task is not None:
        every = multi_task.expand(len(tasks), -1)
        arms.append(Arm("multi-task", every))
        arms.append(Arm("multi-task + description", every, instructions=wordings))
    known = [oracles[task.name] for task in tasks if task.name in oracles]
    if known:  # rows for those tasks alone
        arms.append(Arm("oracle", torch.stack(known)))
    return arms


def controls_of(
    generator: Generator, shuffled: Generator, method: str, tasks: Sequence[Task]
) -> list[Arm]:
    """What the default method does with descriptions that should not help, and with paraphrases."""
    n = len(tasks)
    random_text = [f"{task.name[::-1]} qzx {i * 7919 % 1000}" for i, task in enumerate(tasks)]
    wrong = [tasks[(i + n // 2) % n].test_descriptions()[0] for i in range(n)]
    right = [task.test_descriptions() for task in tasks]

    def drafts(source: Generator, texts: Sequence[str]) -> Tensor:
        return torch.stack([source.draft(source.read(text), method).vector for text in texts])

    arms = [
        Arm("control: shuffled training", drafts(shuffled, [r[0] for r in right])),
        Arm("control: random string", drafts(generator, random_text)),
        Arm("control: wrong description", drafts(generator, wrong)),
    ]
    for i in range(1, len(right[0])):
        arms.append(Arm(f"paraphrase {i}", drafts(generator, [r[i] for r in right])))
    return arms


def _prompts(task: Task) -> list[str]:
    """Unlabelled, and none of those that are scored."""
    return [example.prompt for example in task.examples("train", MIN_PROMPTS)]


def _shots(task: Task) -> str:
    shots: list[Example] = task.examples("train", _N_SHOTS)
    return "\n\n".join(f"{shot.prompt}\n{shot.answer}" for shot in shots) + "\n"
