"""SG-LoRA and ICM-LoRA on raw weights, in short runs: arms of the evaluation, too large to ship."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_generation.bundle import Bundle
from loraplex_generation.icm_lora import ICM_ON_RAW_WEIGHTS, IcmRecipe, train_icm_lora
from loraplex_generation.library import Library
from loraplex_generation.retrieval import condition
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.sg_lora import SG_ON_RAW_WEIGHTS, SgRecipe, train_sg_lora
from loraplex_generation.task_vectors import TaskConditions, TaskVectors
from loraplex_generation.training import Wordings
from loraplex_generation.zoo.tasks import Task

from .arms import Arm

__all__ = ["RawWeightRecipes", "raw_weight_arms"]


@dataclass(frozen=True, slots=True)
class RawWeightRecipes:
    sg: SgRecipe = SG_ON_RAW_WEIGHTS
    icm: IcmRecipe = ICM_ON_RAW_WEIGHTS


def raw_weight_arms(
    bundle: Bundle,
    encoder: SentenceEncoder,
    reader: TaskVectors,
    conditions: TaskConditions,
    tasks: Sequence[Task],
    recipes: RawWeightRecipes,
    report: Callable[[str], None] = lambda _: None,
) -> list[Arm]:
    """Trained here, on the library that `bundle` was trained on; minutes.

    `conditions` of the library's tasks, in its order.
    """
    library = bundle.library
    raw = bundle.subspace.mean + library.snapshots @ bundle.subspace.directions
    asked = [task.test_descriptions()[0] for task in tasks]
    words = Wordings(encoder, [Task.parse(name) for name in library.tasks])
    sentence = words.encoded.sentence
    sg = train_sg_lora(raw, bundle.neighbours, sentence, words.owner, recipes.sg)
    text = encoder.encode(asked).sentence
    mu, var = condition(bundle.neighbours.weights(text), raw.mean(1), raw.var(1, correction=0))
    report("SG-LoRA on raw weights trained")
    scale = _spread(library, raw)
    icm = train_icm_lora(raw, conditions.vectors, conditions.owner, scale, recipes.icm, report)
    vectors = torch.stack([reader.of(wording) for wording in asked])
    return [
        Arm("sg-lora on raw weights", sg.generate(mu, var, text, None)),
        Arm("icm-lora on raw weights", icm.generate(vectors, None)),
    ]


def _spread(library: Library, raw: Tensor) -> Tensor:
    """[layout.size]: standard deviation over the library, one number per B, spread over it."""
    variance = raw.flatten(0, 1).var(0, correction=0)
    parts = torch.split(variance, library.layout.b_sizes)
    scale = torch.cat([part.mean().sqrt().expand_as(part) for part in parts])
    return scale.clamp_min(float(scale.max()) * 1e-3)
