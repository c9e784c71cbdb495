"""A LoRA that learns: its parameters, gradients and Adam's moments."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_training.errors import TrainingError

from .routed_experts import Experts
from .segmented_lora import Dropout

PREFIX = "base_model.model."  # of PEFT's names
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The size of a LoRA and the linears that it adapts."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)  # ends of module names, or "all-linear" alone
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    layers: tuple[int, ...] | None = None  # None = every layer
    dropout: float = 0.0  # on the input of A, in steps alone

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def n_parameters(self, linears: Mapping[str, tuple[int, int]]) -> int:
        """Return the size of an adapter. ``linears``: name → (in, out) features."""
        return sum(self.rank * sum(linears[name]) for name in self.chosen(list(linears)))

    def chosen(self, linears: Sequence[str]) -> list[str]:
        """Return the adapted ones of a base's linears. Raises TrainingError if there are none."""
        names = list(linears)
        if self.targets != ("all-linear",):
            names = [n for n in names if any(n == t or n.endswith(f".{t}") for t in self.targets)]
        if not names:
            raise TrainingError(
                f"no linear of the base is called {', '.join(self.targets)}; its linears are "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linears}))}"
            )
        layers = self.layers
        if layers is None:
            return names
        missing = set(layers) - {layer_of(name) for name in names}
        if missing:
            raise TrainingError(f"the base has no layer {min(missing)} with these linears")
        return [name for name in names if layer_of(name) in layers]


def layer_of(name: str) -> int | None:
    """Return the layer that a module is in, by its name."""
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return None if match is None else int(match[1])


@dataclass(frozen=True, slots=True)
class Adam:
    """The settings of one step of AdamW (Loshchilov and Hutter 2019)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # of the gradient


class LearningAdapter:
    """The state of one adapter. Only the thread of the engine changes it."""

    task_type: str | None = "CAUSAL_LM"  # in PEFT's config
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None
    """A term of the loss, from logits [m, vocabulary] of this adapter and of the base."""

    def __init__(
        self, shape: LoraShape, factors: Mapping[str, tuple[Tensor, Tensor]], seed: int = 0
    ) -> None:
        """``factors``: of each linear A [rank, in] and B [out, rank]. ``seed``: of dropout."""
        self.shape, self._seed = shape, seed
        self.factors = {
            name: (a.detach().float().requires_grad_(), b.detach().float().requires_grad_())
            for name, (a, b) in factors.items()
        }
        self.parameters: dict[str, Tensor] = {}
        """The factors by PEFT's names, as ``base_model.model.….lora_A.weight``."""
        for name, (a, b) in self.factors.items():
            self.parameters[f"{PREFIX}{name}.lora_A.weight"] = a
            self.parameters[f"{PREFIX}{name}.lora_B.weight"] = b
        self.n_steps = self._n_passes = 0  # passes: forwards with a backward since the last step
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}  # Adam's mean and square

    @classmethod
    def fresh(
        cls, shape: LoraShape, linears: Mapping[str, tuple[int, int]], seed: int, device: str
    ) -> "LearningAdapter":
        """Return an adapter with PEFT's initial values. ``linears``: name → (in, out) features."""
        random = torch.Generator().manual_seed(seed)
        factors = {}
        for name in shape.chosen(list(linears)):
            n_in, n_out = linears[name]
            a = torch.empty(shape.rank, n_in).uniform_(-1, 1, generator=random)
            factors[name] = (
                (a / math.sqrt(n_in)).to(device),  # kaiming_uniform_ with a = √5
                torch.zeros(n_out, shape.rank, device=device),
            )
        return cls(shape, factors, seed)

    @classmethod
    def load(cls, folder: Path, device: str) -> "LearningAdapter":
        """Read a plain LoRA of PEFT. Raises TrainingError for another form."""
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        factors: dict[str, list[Tensor]] = {}
        for name in sorted(tensors):
            module, _, leaf = name.removeprefix(PREFIX).rpartition(".lora_")
            if leaf not in ("A.weight", "B.weight"):
                raise TrainingError(f"{name} is no factor of a plain LoRA; start from one")
            factors.setdefault(module, []).append(tensors[name].to(device))
        ranks = {len(a) for a, _ in factors.values()}
        if config.get("peft_type") != "LORA" or config.get("use_dora") or len(ranks) != 1:
            raise TrainingError("only a plain LoRA of one rank can learn further; start from one")
        if config.get("alpha_pattern"):
            raise TrainingError("the adapter has an alpha_pattern; start from one with one alpha")
        shape = LoraShape(
            ranks.pop(),
            float(config["lora_alpha"]),
            tuple(sorted({name.rpartition(".")[2] for name in factors})),
            bool(config.get("use_rslora")),
            None if (layers := config.get("layers_to_transform")) is None else tuple(layers),
        )
        return cls(shape, {name: (a, b) for name, (a, b) in factors.items()})

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def prefix(self) -> Tensor | None:
        """Keys and values of virtual tokens [n, layers, 2, kv heads, head_dim], or None."""
        return None

    @property
    def experts(self) -> Mapping[str, Experts]:
        """The routed experts on MLPs, by the MLPs' names, or nothing."""
        return {}

    def router_penalty(self, logits: Sequence[Tensor]) -> Tensor | None:
        """Return a term of the loss, from the logits [tokens, experts] of each MLP's router."""
        return None

    @property
    def gains(self) -> Mapping[str, Tensor]:
        """The factors of outputs [out] that a family has on all of its linears, or nothing."""
        return {}

    def next_dropout(self) -> Dropout | None:
        """Return the dropout of the next forward with a backward."""
        if not self.shape.dropout:
            return None
        self._n_passes += 1
        seed = (self._seed << 40) + (self.n_steps << 16) + self._n_passes
        return Dropout(self.shape.dropout, seed)

    def peft_config(self, base_name: str) -> dict[str, object]:
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": base_name,
            "r": self.shape.rank,
            "lora_alpha": self.shape.alpha,
            "use_rslora": self.shape.rslora,
            "lora_dropout": self.shape.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted({name.rpartition(".")[2] for name in self.factors}),
            "layers_to_transform": None if self.shape.layers is None else list(self.shape.layers),
        }

    def named_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of the file by their names there."""
        return self.parameters

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return copies of the tensors of the file, on the CPU."""
        return {
            n: t.detach().to("cpu", dtype, copy=True).contiguous()
            for n, t in self.named_tensors().items()
        }

    @torch.no_grad()
    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file. Raises TrainingError if it is of another shape."""
        own = self.named_tensors()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise TrainingError(
                "the adapter to start from has another shape; give its rank, targets and layers"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.refresh()

    def refresh(self) -> None:
        """Called after the parameters have changed. Families drop there what follows from them."""

    def save(self, folder: Path, base_name: str, dtype: torch.dtype = torch.float32) -> None:
        """Write the two files of PEFT into an existing folder. Raises TrainingError."""
        tensors = self.tensors(dtype)
        bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if bad:
            raise TrainingError(f"{len(bad)} tensors are not finite as {dtype}, first {bad[0]}")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(self.peft_config(base_name), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n")  # readers look for it, so it comes last

    def step(self, adam: Adam) -> float:
        """Do a step with the gradient, forget it, and return its norm before clipping.

        Raises TrainingError.
        """
        norm = self.adam_step(adam)
        self.refresh()
        return norm

    def adam_step(self, adam: Adam) -> float:
        """Do Adam's step on the parameters.

        Raises TrainingError if the gradient is not finite; the parameters are then as before.
        """
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        for parameter in self.parameters.values():
            parameter.grad = None
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is {norm} at step {self.n_steps}; lower the learning rate"
            )
        share = 1.0 if adam.clip_norm is None else min(1.0, adam.clip_norm / max(norm, 1e-12))
        self.n_steps, self._n_passes = self.n_steps + 1, 0
        first, second = 1 - adam.beta1**self.n_steps, 1 - adam.beta2**self.n_steps
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameter = self.parameters[name]
                if name not in self.moments:
                    self.moments[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                mean, square = self.moments[name]
                gradient = gradient * share
                mean.lerp_(gradient, 1 - adam.beta1)
                square.mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
                parameter.mul_(1 - adam.lr * adam.weight_decay)
                scale = (square / second).sqrt_().add_(adam.eps)
                parameter.addcdiv_(mean, scale, value=-adam.lr / first)
        return norm

    def saw(self, again: Callable[[], object]) -> None:
        """Called before gradients are added. ``again`` adds those of the same data once more."""

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the state without the moments, to go back to."""
        return {
            f"now.{name}": parameter.detach().to("cpu", copy=True)
            for name, parameter in self.parameters.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return copies of the parameters and the moments, from which learning goes on exactly."""
        state = self.weights()
        for name, (mean, square) in self.moments.items():
            state[f"mean.{name}"] = mean.to("cpu", copy=True)
            state[f"square.{name}"] = square.to("cpu", copy=True)
        state["n_steps"] = torch.tensor(self.n_steps)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``. Without moments in it, the optimiser starts anew.

        Raises TrainingError if the state is of an adapter of another shape.
        """
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                tensor = state.get(f"now.{name}")
                if tensor is None or tensor.shape != parameter.shape:
                    raise TrainingError(f"the saved state has another shape at {name}")
                parameter.copy_(tensor)
                parameter.grad = None
        device = next(iter(self.parameters.values())).device
        self.moments = {
            name: (state[f"mean.{name}"].to(device), state[f"square.{name}"].to(device))
            for name in self.parameters
            if f"mean.{name}" in state
        }
        self.n_steps, self._n_passes = int(state.get("n_steps", torch.tensor(0))), 0
        self.refresh()
