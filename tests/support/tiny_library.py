"""A library and generator of random experts for a tiny base: made in seconds, nothing trained."""

from __future__ import annotations

from pathlib import Path

import torch

from loraplex_generation.bundle import JOINT_FILE
from loraplex_generation.chat_base import ChatBase
from loraplex_generation.experts import Expert, ExpertCard
from loraplex_generation.factors import Factors
from loraplex_generation.icm_lora import IcmRecipe
from loraplex_generation.library import LIBRARY_FILE, export_library
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.sg_lora import SgRecipe
from loraplex_generation.task_vectors import TaskVectors, train_conditions
from loraplex_generation.tensor_file import write_tensor_file
from loraplex_generation.training import train_bundle
from loraplex_generation.zoo.tasks import Task
from loraplex_generation.zoo_training import ZooTraining

__all__ = ["TINY_TASKS", "tiny_library"]

TINY_TASKS = ("past/plain", "past/quotes", "plural/plain", "plural/caps", "list-first/quotes")


def tiny_library(folder: Path, chat: ChatBase, encoder: SentenceEncoder) -> Path:
    """`folder` with the three files that `Bundle.load` reads."""
    torch.manual_seed(0)
    layout = ZooTraining.layout_for(chat.base)
    tasks = [Task.parse(name) for name in TINY_TASKS]
    common = 0.05 * torch.randn(layout.size)
    experts = []
    for task in tasks:
        mean = common + 0.05 * torch.randn(layout.size)
        card = ExpertCard(task.name, 8, base_nll=4.0, start_nll=3.0, nll=1.0, base_exact=0, exact=1)
        snapshots = mean + 0.001 * torch.randn(3, layout.size)
        experts.append(Expert(card, mean, snapshots))
    folder.mkdir()
    export_library(folder / LIBRARY_FILE, layout, chat.base.fingerprint, experts, [])
    factors = Factors.of(tasks)
    write_tensor_file(
        folder / JOINT_FILE,
        {"vectors": (0.05 * torch.randn(factors.size, layout.size)).bfloat16()},
        {
            "format": "loraplex-joint-1",
            "layout": layout.to_dict(),
            "base": chat.base.fingerprint,
            "tasks": list(TINY_TASKS),
            "factors": factors.names,
            "step": 1,
        },
    )
    bundle = train_bundle(
        folder,
        encoder,
        sg=SgRecipe(n_steps=2, hidden=8, latent=2),
        icm=IcmRecipe(n_steps=2, batch=4, latent=2, channels=(2, 2)),
        conditions=train_conditions(TaskVectors(lambda: chat), tasks),
    )
    bundle.save(folder)
    return folder
