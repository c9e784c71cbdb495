"""The hooks of a recipe, and the adapter that learns by them.

A recipe may train other numbers than the factors of a LoRA, the ``trained`` tensors of a ``Part``.
``factors`` computes A and B from them, and the gradients of A and B are pulled back through it, so
that the engine knows plain LoRAs alone. What the recipe takes away from the base in training is
two more blocks of A and B that stay as they are. The saved file is therefore a plain LoRA.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from loraplex_training.engine.adapter import PREFIX, Adam, LearningAdapter, LoraShape
from loraplex_training.errors import TrainingError

_PROBED = 1 << 26  # entries of weights whose gradients are computed at once


@dataclass(slots=True)
class Part:
    """The state of one linear: float32 tensors by name."""

    trained: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.trained[name] if name in self.trained else self.frozen[name]


class FrozenBase(Protocol):
    """The base whose linears an adapter changes."""

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Return the linears that adapters may have: name → (in, out) features."""

    @property
    def device(self) -> torch.device: ...

    def weight(self, name: str) -> Tensor:
        """Return a float32 copy of the weight [out, in] of a linear."""


@dataclass(frozen=True, slots=True)
class Start:
    """Offers what an initialisation may read. Only the thread of the engine uses it."""

    base: FrozenBase
    shape: LoraShape
    seed: int
    learn: Callable[[LearningAdapter], object] | None = None
    """Adds the gradients of a sample of the training data; None without data."""

    @property
    def linears(self) -> list[str]:
        return self.shape.chosen(list(self.base.linears))

    def weight(self, name: str) -> Tensor:
        """Return a float32 copy of a base weight [out, in]."""
        return self.base.weight(name)

    def fresh(self) -> LearningAdapter:
        """Return a LoRA with PEFT's initial values: A by Kaiming, B zero."""
        base = self.base
        return LearningAdapter.fresh(self.shape, base.linears, self.seed, str(base.device))

    def plain(self) -> dict[str, Part]:
        """Return PEFT's initial values by linear."""
        adapter = self.fresh()
        return {
            n: Part({"A": a.detach(), "B": b.detach()}) for n, (a, b) in adapter.factors.items()
        }

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each adapted linear and ∇W [out, in] of the loss of the sample, summed.

        With A = I and B = 0 (or B = I and A = 0) the gradient of the other factor is ∇W itself.
        """
        if self.learn is None:
            raise TrainingError("this recipe starts from gradients and needs training data")
        sizes, device = self.base.linears, self.base.device
        names = self.linears
        while names:
            n, total = 0, 0
            while n < len(names) and (n == 0 or total < _PROBED):
                total += math.prod(sizes[names[n]])
                n += 1
            factors = {}
            for name in names[:n]:
                n_in, n_out = sizes[name]
                rank = min(n_in, n_out)
                ones, a = torch.eye(rank, device=device), torch.zeros(rank, n_in, device=device)
                b = torch.zeros(n_out, rank, device=device)
                factors[name] = (ones, b) if n_in <= n_out else (a, ones)
            probe = LearningAdapter(LoraShape(1, 1.0), factors)
            self.learn(probe)
            for name in names[:n]:
                n_in, n_out = sizes[name]
                gradient = probe.factors[name][1 if n_in <= n_out else 0].grad
                assert gradient is not None
                yield name, gradient
            names = names[n:]


Initialisation = Callable[[Start], Mapping[str, Part]]
"""Returns the state of every adapted linear before the first step."""

Factors = Callable[[Part, float], tuple[Tensor, Tensor]]
"""Returns A [k, in] and B [out, k] of ΔW = scale · B A; differentiable in ``trained``."""

GradientHook = Callable[["RecipeAdapter"], None]
"""Changes the gradients of the trained tensors, in place, before a step."""

Optimiser = Callable[["RecipeAdapter", Adam], float]
"""Does a step with the gradients, forgets them, and returns their norm before clipping."""


def _plain_start(start: Start) -> Mapping[str, Part]:
    return start.plain()


def _plain_factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return part["A"], part["B"]


def _no_change(adapter: "RecipeAdapter") -> None:
    return None


def _adam(adapter: "RecipeAdapter", adam: Adam) -> float:
    return adapter.adam_step(adam)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The hooks of one recipe, each plain LoRA's by default."""

    start: Initialisation = _plain_start
    factors: Factors = _plain_factors
    gradient: GradientHook = _no_change
    optimiser: Optimiser = _adam
    served: Factors | None = None  # the factors that are saved, if training adds to them
    prunes: bool = False  # ranks and linears that are zero are not saved
    scale: float | None = None  # of ΔW, instead of the shape's
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None  # see LearningAdapter
    repeats: bool = False  # the gradient hook calls ``RecipeAdapter.repeat``


class RecipeAdapter(LearningAdapter):
    """An adapter whose parameters are a recipe's trained tensors."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        """Initialise by the recipe. Raises TrainingError."""
        shape = start.shape
        self.recipe, self.penalty = recipe, recipe.penalty
        self._seen: list[Callable[[], object]] = []
        self._repeating = False
        self.scale = shape.scale if recipe.scale is None else recipe.scale
        self.parts = dict(recipe.start(start))
        for part in self.parts.values():
            part.trained = {
                n: t.detach().float().clone().requires_grad_() for n, t in part.trained.items()
            }
        factors = self._factors(recipe.factors)
        rank = max(a.shape[0] for a, _ in factors.values())
        alpha = self.scale * (math.sqrt(rank) if shape.rslora else rank)
        super().__init__(replace(shape, rank=rank, alpha=alpha), factors, start.seed)
        self.parameters = {
            f"{name}.{leaf}": tensor
            for name, part in self.parts.items()
            for leaf, tensor in part.trained.items()
        }

    def step(self, adam: Adam) -> float:
        self.pull_back()
        self.recipe.gradient(self)
        norm = self.recipe.optimiser(self, adam)
        self.refresh()
        self._seen.clear()
        return norm

    def saw(self, again: Callable[[], object]) -> None:
        if self.recipe.repeats and not self._repeating:
            self._seen.append(again)

    def repeat(self) -> None:
        """Compute the gradients of this step's data again, at the trained tensors as they are."""
        self._repeating = True
        try:
            self.refresh()
            for again in self._seen:
                again()
        finally:
            self._repeating = False
        self.pull_back()

    def pull_back(self) -> None:
        """Turn the gradients of A and B into those of the trained tensors, which they add to."""
        values, gradients = [], []
        for name, part in self.parts.items():
            for value, leaf in zip(
                self.recipe.factors(part, self.scale), self.factors[name], strict=True
            ):
                if value.requires_grad and leaf.grad is not None:
                    values.append(value)
                    gradients.append(leaf.grad)
                leaf.grad = None
        if values:
            torch.autograd.backward(values, gradients)

    def refresh(self) -> None:
        """Set A and B to those of the trained tensors."""
        with torch.no_grad():
            for name, factors in self._factors(self.recipe.factors).items():
                for leaf, value in zip(self.factors[name], factors, strict=True):
                    leaf.copy_(value)

    def named_tensors(self) -> Mapping[str, Tensor]:
        """Return the plain LoRA that is saved, by PEFT's names."""
        tensors = {}
        for name, (a, b) in self._served().items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        return tensors

    def peft_config(self, base_name: str) -> dict[str, object]:
        served = self._served()
        ranks = {name: a.shape[0] for name, (a, _) in served.items()}
        rank = max(ranks.values())
        config = super().peft_config(base_name) | {"r": rank, "lora_alpha": self._alpha(rank)}
        if len({*ranks.values()}) > 1 or len(served) < len(self.parts):
            config["target_modules"] = sorted(served)
            others = {name: k for name, k in sorted(ranks.items()) if k != rank}
            config["rank_pattern"] = others
            config["alpha_pattern"] = {name: self._alpha(k) for name, k in others.items()}
        return config

    def weights(self) -> dict[str, Tensor]:
        frozen = {
            f"frozen.{name}.{leaf}": tensor.to("cpu", copy=True)
            for name, part in self.parts.items()
            for leaf, tensor in part.frozen.items()
        }
        return super().weights() | frozen

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for name, part in self.parts.items():
            for leaf, tensor in part.frozen.items():
                part.frozen[leaf] = state[f"frozen.{name}.{leaf}"].to(tensor.device)
        self.refresh()

    def _alpha(self, rank: int) -> float:
        return self.scale * (math.sqrt(rank) if self.shape.rslora else rank)

    def _factors(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return {name: factors(part, self.scale) for name, part in self.parts.items()}

    def _served(self) -> dict[str, tuple[Tensor, Tensor]]:
        served = self._factors(self.recipe.served or self.recipe.factors)
        if not self.recipe.prunes:
            return served
        kept = {}
        for name, (a, b) in served.items():
            open_ranks = a.any(1) & b.any(0)
            if bool(open_ranks.any()):
                kept[name] = a[open_ranks], b[:, open_ranks]
        return kept or served  # an untrained adapter changes nothing
