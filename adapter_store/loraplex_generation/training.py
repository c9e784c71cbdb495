"""`loraplex generator train`: every map from a description to an adapter, from one library.

Minutes on two cores, nearly all of them the task vectors of ICM-LoRA. The end-to-end map is
trained by `loraplex zoo train` (stage one), since it is also where the experts start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation.zoo.short_wordings import short_wordings
from loraplex_generation.zoo.tasks import Task

from .bundle import JOINT_FILE, Bundle, replace_guard
from .factors import Factors, train_factor_head
from .guard import OodDetector
from .icm_lora import IcmRecipe, train_icm_lora
from .library import LIBRARY_FILE, Library
from .regressors import fit_mlp, fit_ridge
from .retrieval import choose_neighbours
from .sentences import Encoded, SentenceEncoder
from .sg_lora import SgRecipe, train_sg_lora
from .task_vectors import TaskConditions
from .tensor_file import read_tensor_file

__all__ = ["Wordings", "fit_guard", "refit_guard", "train_bundle"]


class Wordings:
    """All training descriptions of a set of tasks, encoded; `casual`: twice as many."""

    def __init__(
        self, encoder: SentenceEncoder, tasks: Sequence[Task], *, casual: bool = False
    ) -> None:
        styles = [Task.descriptions, *([Task.casual_descriptions] if casual else [])]
        found = [
            (i, phrases, wording)
            for i, task in enumerate(tasks)
            for style in styles
            for phrases, wording in zip(task.phrases(), style(task), strict=True)
        ]
        self.tasks = tuple(tasks)
        self.owner = torch.tensor([i for i, _, _ in found])
        self.phrases = [phrases for _, phrases, _ in found]  # (operation's, format's)
        self.encoded: Encoded = encoder.encode([wording for _, _, wording in found])

    @property
    def centroids(self) -> Tensor:
        """[n_tasks, width]: mean of the wordings of each task, length 1."""
        sums = torch.zeros(len(self.tasks), self.encoded.sentence.shape[1])
        return F.normalize(sums.index_add_(0, self.owner, self.encoded.sentence), dim=-1)


def train_bundle(
    folder: Path,
    encoder: SentenceEncoder,
    *,
    seed: int = 0,
    default: str = "end-to-end",
    sg: SgRecipe = SgRecipe(),  # noqa: B008  frozen value
    icm: IcmRecipe = IcmRecipe(),  # noqa: B008
    conditions: TaskConditions | None = None,
    shuffle: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """From `folder`'s library and joint vectors.

    `conditions` are those of the library's tasks, in its order; None leaves ICM-LoRA out.
    `shuffle` is a control: every task's descriptions are given to another task.
    """
    library = Library.load(folder / LIBRARY_FILE)
    joint = read_tensor_file(folder / JOINT_FILE)
    subspace = library.subspace()
    words = Wordings(encoder, [Task.parse(name) for name in library.tasks])
    trained = Wordings(encoder, [Task.parse(name) for name in joint.header["tasks"]], casual=True)
    factors = Factors.of(trained.tasks)
    labels = torch.tensor([factors.labels(t) for t in trained.tasks])
    if shuffle:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(words.tasks), generator=generator)
        words.owner = order[words.owner]
        if conditions is not None:
            conditions = conditions._replace(owner=order[conditions.owner])
        labels = labels[torch.randperm(len(labels), generator=generator)]
    report(f"library of {len(library.tasks)} experts spans {subspace.size} directions")
    means = library.snapshots.mean(1)
    sentence = words.encoded.sentence
    neighbours = choose_neighbours(words.centroids, sentence, words.owner, means)
    report(f"neighbours k={neighbours.k} tau={neighbours.tau}")
    bundle = Bundle(
        library=library,
        subspace=subspace,
        vectors=joint.tensors["vectors"],
        joint_digest=joint.digest,
        joint_step=int(joint.header["step"]),
        factors=factors,
        head=train_factor_head(trained.encoded, labels[trained.owner], factors.groups, seed=seed),
        neighbours=neighbours,
        ood_score=fit_guard(encoder, trained),
        wordings=trained.encoded.sentence,
        tasks=tuple(task.name for task in trained.tasks),
        owner=trained.owner,
        ridge=fit_ridge(sentence, words.owner, means),
        mlp=fit_mlp(sentence, words.owner, means, seed=seed),
        sg=train_sg_lora(
            library.snapshots, neighbours, sentence, words.owner, replace(sg, seed=seed)
        ),
        icm=None,
        default=default,
        sg_recipe=replace(sg, seed=seed),
        icm_recipe=replace(icm, seed=seed),
    )
    report("ridge, MLP, SG-LoRA done")
    if conditions is not None:
        bundle.icm = train_icm_lora(
            library.snapshots,
            conditions.vectors,
            conditions.owner,
            means.std().expand(subspace.size),  # one scale: directions keep their weight
            bundle.icm_recipe,
            report,
        )
    return bundle


def refit_guard(folder: Path, encoder: SentenceEncoder) -> Path:
    """Fits the guard of `folder`'s generator anew; every map keeps its bits."""
    joint = read_tensor_file(folder / JOINT_FILE)
    tasks = [Task.parse(name) for name in joint.header["tasks"]]
    return replace_guard(folder, fit_guard(encoder, Wordings(encoder, tasks, casual=True)))


def fit_guard(encoder: SentenceEncoder, known: Wordings) -> OodDetector:
    """From the casual wordings of the trained tasks, and as many short ones as there are."""
    short = short_wordings(known.tasks)
    owners = [*known.owner.tolist(), *[wording.task for wording in short]]
    return OodDetector.fit(
        torch.cat([known.encoded.sentence, encoder.encode([w.text for w in short]).sentence]),
        [known.tasks[i].operation for i in owners],
        [*known.phrases, *[wording.phrases for wording in short]],
    )
