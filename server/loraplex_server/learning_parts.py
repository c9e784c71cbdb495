"""Builds what learns in a server: the thread on the base's weights, and the shipped start."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loraplex_generation.errors import GeneratorMismatch, NotTrained
from loraplex_generation.generated import Generator
from loraplex_generation.multi_task import METHOD, MultiTaskAdapter
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_generation.shipped import shipped_folder
from loraplex_training.engine.dtype import compute_dtype
from loraplex_training.engine.engine import TrainingEngine

from .adapters.learning.background_share import BackgroundShare
from .adapters.learning.example_learner import Start
from .adapters.learning.training_thread import TrainingThread
from .model.loading.loader import Lazy, run_load
from .served_base import ServedBase
from .settings.config import LearningConfig

if TYPE_CHECKING:
    from loraplex_training.engine.frozen_model import BaseWeights, FrozenModel


def training_thread(options: LearningConfig, served: ServedBase) -> TrainingThread:
    """Return the thread that trains on the served weights."""

    def is_serving() -> bool:
        stats = served.engine.stats()
        return stats.n_running + stats.n_waiting > 0

    share = BackgroundShare(options.share, is_serving)
    return _thread(served.path, served.weights, share, options.n_threads)


def folder_thread(directory: Path) -> TrainingThread:
    """Return a thread that trains on the base of a folder, without a server."""
    share = BackgroundShare(1.0, lambda: False)
    return _thread(directory, None, share, os.cpu_count() or 1)


def generator_finder(base_name: str, base_directory: Path) -> Callable[[], Generator]:
    """Return a function that loads the multi-task adapter once. It raises GeneratorMismatch.

    A mismatch is cached, too.
    """

    def load() -> MultiTaskAdapter | str:
        try:
            return MultiTaskAdapter.load(
                shipped_folder(), base_name=base_name, base_directory=base_directory
            )
        except GeneratorMismatch as error:
            return str(error)

    lazy = Lazy(load)

    def find() -> Generator:
        generator = lazy.get()
        if isinstance(generator, str):
            raise GeneratorMismatch(generator)
        return generator

    return find


def starts_of(
    find_generator: Callable[[], Generator],
) -> Callable[[AdapterGenerationRequest], Sequence[Start]]:
    """Return a function that finds the adapters that learning may begin with."""

    def find(request: AdapterGenerationRequest) -> Sequence[Start]:
        try:
            find_generator()
        except (GeneratorMismatch, NotTrained):
            return ()
        return (Start(METHOD, lambda engine: engine.load_adapter(shipped_folder())),)

    return find


def _thread(
    directory: Path, weights: "BaseWeights | None", share: BackgroundShare, n_threads: int
) -> TrainingThread:
    """``weights`` None: those of the folder, since another process or a GPU serves."""

    def make_engine(rest: Callable[[], None]) -> TrainingEngine:
        return TrainingEngine(run_load(lambda: _frozen(directory, weights, rest)))

    return TrainingThread(make_engine, share, n_threads)


def _frozen(
    directory: Path, weights: "BaseWeights | None", rest: Callable[[], None]
) -> "FrozenModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    from loraplex_training.engine.frozen_model import FrozenModel
    from loraplex_training.engine.model_weights import ModelWeights

    if weights is None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        weights = ModelWeights(model)
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    is_exact = weights.embedding()().dtype is torch.float32  # a base in float32 learns in it, too
    dtype = torch.float32 if is_exact else compute_dtype(torch.device("cpu"))
    return FrozenModel(config, weights, dtype=dtype, rest=rest)
