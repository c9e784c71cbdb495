"""What one can do with a sentence and k examples: an adapter, an instruction, or both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loraplex_generation.errors import NothingLearnt
from loraplex_generation.experts import ExpertRecipe, train_experts
from loraplex_generation.from_examples import encode_pairs, generate_from_examples
from loraplex_generation.refinement import RefinementRecipe, refine
from loraplex_generation.task_vectors import MIN_PROMPTS
from loraplex_generation.taskdata import TaskData
from loraplex_generation.turns import beats_turns
from loraplex_generation.zoo.tasks import Example, Task

from .bench import Bench
from .lorahub import search_weights

__all__ = ["ARMS", "ORACLE_K", "Arm", "Asked", "Learnt"]

ORACLE_K = 600  # examples that the oracle draws from
_ORACLE = ExpertRecipe(max_steps=96, lr=3e-3)


@dataclass(frozen=True, slots=True)
class Asked:
    """What every arm gets."""

    task: Task
    sentence: str
    examples: Sequence[Example]
    recipe: RefinementRecipe
    seed: int
    budget_s: float = 0.0  # 0: no limit

    @property
    def deadline(self) -> float:
        return time.monotonic() + self.budget_s if self.budget_s else math.inf


@dataclass(frozen=True, slots=True)
class Learnt:
    """`vector` [layout.size or .full_size], None: the base.

    `instruction` and `earlier`, answered turns of the same chat, precede every prompt.
    """

    vector: Tensor | None = None
    instruction: str = ""
    earlier: Sequence[Example] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arm:
    learn: Callable[[Bench, Asked], Learnt]
    about: str
    ks: tuple[int, ...] = (0, 2, 4, 8, 16, 32)
    needs_multi_task: bool = False
    has_draws: bool = True  # whether the choice of examples matters


def _base(bench: Bench, asked: Asked) -> Learnt:
    return Learnt()


def _prompt(bench: Bench, asked: Asked) -> Learnt:
    return Learnt(instruction=_instruction(asked))


def _turns(bench: Bench, asked: Asked) -> Learnt:
    return Learnt(instruction=asked.sentence, earlier=asked.examples)


def _multi_task(bench: Bench, asked: Asked) -> Learnt:
    return Learnt(bench.multi_task, _instruction(asked))


def _instruction(asked: Asked) -> str:
    shots = [f"{example.prompt}\n{example.answer}\n" for example in asked.examples]
    return "\n".join([asked.sentence, *shots])


def _generated(method: str) -> Callable[[Bench, Asked], Learnt]:
    """As the server does it: the draft for k = 0, else what comes of it and the examples."""

    def learn(bench: Bench, asked: Asked) -> Learnt:
        generator = bench.generator
        refused = generator.refuses(generator.read(asked.sentence), method)
        is_served = method == "auto"  # behind the guard, which the published methods do not have
        if not asked.examples:
            if refused and is_served:
                return Learnt(told={"refused": True})
            made = generator.generate(asked.sentence, method=method, force=True)
            return Learnt(made.vector, told={"refused": refused})
        unlabelled = [example.prompt for example in asked.examples]
        reads_prompts = method == "icm-lora" and len(unlabelled) >= MIN_PROMPTS
        try:
            made = generate_from_examples(
                generator,
                bench.base,
                bench.codec,
                asked.sentence,
                asked.examples,
                unlabelled=unlabelled if reads_prompts else (),
                method=method,
                force=not is_served,
                recipe=asked.recipe,
                deadline=asked.deadline,
            )
        except NothingLearnt:
            return Learnt(told={"refused": refused, "gained": False})
        told = made.card["refinement"]
        assert isinstance(told, dict)
        return Learnt(made.vector, told={"refused": refused, **told})

    return learn


def _chat(bench: Bench, asked: Asked) -> Learnt:
    """As the server answers a chat that has brought its examples, once their job has ended."""
    learnt = _generated("auto")(bench, asked)
    if beats_turns(learnt.told):
        return learnt
    return replace(_turns(bench, asked), told=learnt.told)


def _both(bench: Bench, asked: Asked) -> Learnt:
    learnt = _generated("auto")(bench, asked)
    return replace(_turns(bench, asked), vector=learnt.vector, told=learnt.told)


def _from(start: Callable[[Bench], Tensor]) -> Callable[[Bench, Asked], Learnt]:
    """LoRA on the examples alone, with the recipe's steps, judges and ways, but no span."""

    def learn(bench: Bench, asked: Asked) -> Learnt:
        recipe = replace(asked.recipe, span_steps=0, steps=asked.recipe.n_steps)
        made = refine(
            bench.base,
            bench.layout,
            bench.generator.span,
            bench.codec.head,
            encode_pairs(bench.codec, asked.examples),
            {"start": start(bench)},
            recipe=recipe,
            deadline=asked.deadline,
        )
        return Learnt(made.vector, told={"gained": made.gained, "steps": made.steps})

    return learn


def _lorahub(bench: Bench, asked: Asked) -> Learnt:
    rows = encode_pairs(bench.codec, asked.examples)

    def loss(experts: Tensor, weights: Tensor) -> float:
        return bench.loss(rows, weights @ bench.experts(experts))

    found = search_weights(loss, bench.n_experts, seed=asked.seed, deadline=asked.deadline)
    vector = found.weights @ bench.experts(found.experts)
    return Learnt(vector, told={"tries": found.n_tries, "loss": round(found.loss, 4)})


def _oracle(bench: Bench, asked: Asked) -> Learnt:
    """An adapter trained on the task itself, from the library's mean."""
    made = train_experts(
        bench.base,
        bench.layout,
        TaskData(bench.codec),
        [asked.task],
        bench.generator.library_mean()[None],
        _ORACLE,
    )[0]
    return Learnt(made.mean, told={"steps": made.card.steps})


_WITH_EXAMPLES = (2, 4, 8, 16, 32)
ARMS: dict[str, Arm] = {
    "base": Arm(_base, "the base, without the sentence", ks=(0,), has_draws=False),
    "prompt": Arm(_prompt, "sentence and examples in the prompt of the base"),
    "turns": Arm(
        _turns, "the sentence in front of the examples as earlier turns", ks=_WITH_EXAMPLES
    ),
    "multi-task": Arm(
        _multi_task, "the same in the prompt of a multi-task LoRA", needs_multi_task=True
    ),
    "zero": Arm(
        _from(lambda bench: torch.zeros(bench.layout.size)),
        "LoRA on the examples, from zero",
        ks=_WITH_EXAMPLES,
    ),
    "mean": Arm(
        _from(lambda bench: bench.generator.library_mean()),
        "LoRA on the examples, from the library's mean",
        ks=_WITH_EXAMPLES,
    ),
    "lorahub": Arm(_lorahub, "LoraHub: weights of 20 experts", ks=_WITH_EXAMPLES),
    "text-to-lora": Arm(
        _generated("mlp"), "an MLP from the sentence to the experts, as Text-to-LoRA regresses"
    ),
    "sg-lora": Arm(_generated("sg-lora"), "SG-LoRA's draft, then learning"),
    "icm-lora": Arm(_generated("icm-lora"), "ICM-LoRA's draft (from k = 8 with prompts), learning"),
    "ours": Arm(_generated("auto"), "what the server does"),
    "chat": Arm(_chat, "ours, or turns where they are better on held-out pairs", ks=_WITH_EXAMPLES),
    "both": Arm(_both, "turns under ours", ks=_WITH_EXAMPLES),
    "oracle": Arm(
        _oracle, f"a LoRA trained on {ORACLE_K} examples", ks=(ORACLE_K,), has_draws=False
    ),
}
"""Of the methods that read a sentence, the row k = 0 is the published one; k > 0 learns from it.

`text-to-lora`, `sg-lora` and `icm-lora` are fitted on the library's experts alone. The text map of
`ours` knows more tasks, so what lies between them is not the method alone.
"""
