"""Few-shot classification with CLIP: cross-entropy over the cosines to the classes' prompts.

    logits[image, class] = exp(t) · cos(image, "a photo of a <class>.")

CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv 2405.18541) trains LoRA on q, k and v of both towers so;
its released code has rank 2, alpha 1, the scale alpha / √rank, dropout 0.25 and weight decay 0.01,
which are the defaults here. Its random crops and flips are left out: images are read as the server
reads them. The other methods replace the LoRA by another recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraplex_training.config import BlockShape
from loraplex_training.engine.adapter import CONFIG, WEIGHTS, Adam, LearningAdapter, LoraShape
from loraplex_training.errors import CheckpointError, TrainingError
from loraplex_training.families.block_lora import block_recipe
from loraplex_training.recipes.recipe import Recipe, RecipeAdapter, Start
from loraplex_training.recipes.table import RECIPES
from loraplex_training.schedule import rate_share

from .clip_base import ClipBase
from .config import BLOCK_LORA, ImageShape, ImageTraining
from .image_folder import LabelledImages, read_folder


class Classified(NamedTuple):
    """The share of images whose label is right, by the base alone and through the adapter."""

    zero_shot: float
    tuned: float


class TrainedClasses(NamedTuple):
    folder: Path
    labels: tuple[str, ...]
    n_images: int
    n_parameters: int
    loss: float  # of the last step
    accuracy: Classified | None  # of the validation; None without


OnStep = Callable[[int, float], None]  # steps done, and the loss before the last


def train_on_images(
    config: ImageTraining,
    *,
    on_step: OnStep = lambda step, loss: None,
    overwrite: bool = False,
) -> TrainedClasses:
    """Train an adapter on a folder of images and write a PEFT directory to ``config.out``.

    The run lasts minutes and keeps no checkpoint. Raises TrainingError.
    """
    if (config.out / CONFIG).exists() and not overwrite:
        raise CheckpointError(f"{config.out} holds an adapter already; give --overwrite to replace")
    images = read_folder(config.data)
    validation = None
    if config.validation is not None:
        validation = read_folder(config.validation, images.labels)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = ClipBase.load(config.base, device)
    run = FewShot(base, images, config)
    loss = run.loop(on_step)
    accuracy = None if validation is None else run.classify(validation)
    run.save(accuracy)
    return TrainedClasses(
        config.out,
        tuple(images.labels),
        len(images.images),
        run.adapter.n_parameters,
        loss,
        accuracy,
    )


class FewShot:
    """A run in memory: the images, the prompts of the classes, and the adapter that learns."""

    def __init__(self, base: ClipBase, images: LabelledImages, config: ImageTraining) -> None:
        """Read all images. Raises TrainingError."""
        self._base, self._config, self._labels = base, config, images.labels
        self._pixels = base.pixels([file for file, _ in images.images])
        self._classes = torch.tensor([label for _, label in images.images], device=base.device)
        self._prompts = self._prompts_of(images.labels)
        shape = config.shape
        lora = LoraShape(shape.rank, shape.alpha, shape.targets, True, dropout=shape.dropout)
        start = Start(base, lora, config.seed, self._learn_sample)
        self.adapter = RecipeAdapter(_recipe(shape), start)
        self.adapter.task_type = None  # PEFT has none for CLIP

    def loop(self, on_step: OnStep = lambda step, loss: None) -> float:
        """Do all steps and return the loss of the last. Raises TrainingError."""
        config, loss = self._config, math.nan
        rows = self._batches()
        for step in range(config.steps):
            loss = self._learn(self.adapter, next(rows))
            if not math.isfinite(loss):
                raise TrainingError(f"the loss is {loss} at step {step}; lower the learning rate")
            rate = config.lr * rate_share(step, config.steps, n_warmup=1)
            self.adapter.step(Adam(rate, weight_decay=1e-2))
            on_step(step + 1, loss)
        return loss

    def classify(self, images: LabelledImages) -> Classified:
        """Return the accuracy on images of these or of other classes. Raises TrainingError."""
        right = dict.fromkeys((None, self.adapter), 0)
        prompts = self._prompts_of(images.labels)
        for first in range(0, len(images.images), self._config.batch_images):
            part = images.images[first : first + self._config.batch_images]
            pixels = self._base.pixels([file for file, _ in part])
            classes = torch.tensor([label for _, label in part], device=self._base.device)
            for adapter in right:
                best = self._base.logits(pixels, prompts, adapter).argmax(-1)
                right[adapter] += int((best == classes).sum())
        zero_shot, tuned = (n / len(images.images) for n in right.values())
        return Classified(zero_shot, tuned)

    def save(self, accuracy: Classified | None) -> None:
        """Write the adapter and its card. Raises TrainingError."""
        config = self._config
        config.out.mkdir(parents=True, exist_ok=True)
        for file in (CONFIG, WEIGHTS):
            (config.out / file).unlink(missing_ok=True)
        card = {
            "name": config.name or config.out.name,
            "description": config.description
            or f"Tells apart {', '.join(self._labels)} in images.",
            "base": config.base_name,
            "training": {
                "labels": list(self._labels),
                "template": config.template,
                "n_images": len(self._pixels),
                "n_parameters": self.adapter.n_parameters,
                "shape": asdict(config.shape),
                "steps": config.steps,
                "lr": config.lr,
                "seed": config.seed,
                **({} if accuracy is None else accuracy._asdict()),
            },
        }
        (config.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        self.adapter.save(config.out, config.base_name, getattr(torch, config.shape.stored_dtype))

    def _prompts_of(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        return self._base.tokens([self._config.prompt(label) for label in labels])

    def _learn(self, adapter: LearningAdapter, rows: Tensor) -> float:
        """Add the gradients of the mean loss of some images, and return the loss."""
        adapter.saw(lambda: self._learn(adapter, rows))
        pixels, classes = self._pixels[rows], self._classes[rows.to(self._classes.device)]
        logits = self._base.logits(pixels, self._prompts, adapter, learning=True)
        loss = cross_entropy(logits, classes)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _learn_sample(self, probe: LearningAdapter) -> float:
        return self._learn(probe, torch.arange(min(len(self._pixels), self._config.batch_images)))

    def _batches(self) -> Iterator[Tensor]:
        """Yield the rows of each step without end; each epoch has all images in another order."""
        random = torch.Generator().manual_seed(self._config.seed)
        while True:
            order = torch.randperm(len(self._pixels), generator=random)
            yield from torch.split(order, self._config.batch_images)


def _recipe(shape: ImageShape) -> Recipe:
    if shape.family == BLOCK_LORA:
        return block_recipe(shape.blocks or BlockShape())
    return RECIPES.get(shape.family, Recipe())
