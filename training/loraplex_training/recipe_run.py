"""A run of `loraplex train` by a recipe, on the training engine."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .engine.adapter import Adam, LearningAdapter, LoraShape
from .engine.data import Datum
from .engine.dtype import compute_dtype
from .engine.engine import TrainingEngine, Work
from .engine.frozen_model import FrozenModel
from .engine.model_weights import ModelWeights
from .errors import TrainingError
from .examples import Example
from .recipes.recipe import RecipeAdapter
from .recipes.table import new_adapter
from .run import Run

_BETA2 = 0.99


class RecipeRun(Run):
    def _attach(self, base: PreTrainedModel) -> None:
        config, shape = self._config, self._config.shape
        if config.start is not None:
            raise TrainingError("a recipe begins with its own start; leave out --start")
        model = FrozenModel(
            base.config,
            ModelWeights(base),
            dtype=compute_dtype(torch.device(self._device)),
            device=self._device,
        )
        self._engine = TrainingEngine(model)
        lora = LoraShape(shape.rank, shape.alpha, tuple(shape.targets), shape.rslora)
        data = [_datum(example, 1.0) for example in self._data.train]
        adapter = new_adapter(self._engine, shape.recipe, lora, config.schedule.seed, data)
        assert isinstance(adapter, RecipeAdapter)
        self._adapter, self._trained = adapter, adapter.parameters

    def _learn(self, examples: list[Example], lr: float) -> tuple[float, int]:
        n = sum(sum(example.learn[1:]) for example in examples)
        work = Work(self._adapter, [_datum(example, 1 / n) for example in examples])
        (outcome,) = self._engine.forward_backward([work])
        decay = self._config.schedule.weight_decay
        self._engine.step(self._adapter, Adam(lr, beta2=_BETA2, weight_decay=decay))
        return outcome.loss, outcome.n_tokens

    def _score(self, examples: list[Example]) -> tuple[float, int]:
        is_first = self._progress.step == 0
        adapter = LearningAdapter(self._adapter.shape, {}) if is_first else self._adapter
        work = Work(adapter, [_datum(example, 1.0) for example in examples])
        (outcome,) = self._engine.forward_backward([work], backward=False)
        return outcome.loss, sum(sum(example.learn[1:]) for example in examples)

    def _weights(self) -> dict[str, Tensor]:
        return self._adapter.weights()

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        self._adapter.load_state(weights)

    def _state(self) -> dict[str, Tensor]:
        return self._adapter.state()

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        self._adapter.load_state(tensors)

    def _save(self, folder: Path) -> None:
        dtype = getattr(torch, self._config.shape.stored_dtype)
        self._adapter.save(folder, self._config.base_name, dtype)


def _datum(example: Example, weight: float) -> Datum:
    datum = Datum.of_chat(example.tokens, example.learn)
    return Datum(datum.tokens, datum.targets, datum.weights * weight)
