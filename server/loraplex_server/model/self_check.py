"""Compares the replaced model with transformers' own forward before anything is served.

    capture   on the loaded instance, while every module of it is still transformers'
    check     on the model that replaced it: a prefill of two prompts in one step, then decode steps

The second prompt is at the end of the context, where scaled positions differ most. The tolerance
comes from the model, too: its own forward runs the prompts again with each layer's output changed
by about as much as its dtype rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .call_recorder import attention_as
from .errors import UnsupportedBase
from .forward_context import ForwardContext
from .model_trace import ModelTrace

__all__ = ["Checkable", "Reference"]

_N_PROMPTS = 2
_N_TOKENS = 20  # of a prompt
_N_DECODED = 3  # of them one by one
_PAGE = 16  # tokens of a page: a prompt crosses into its second
_MARGIN = 4.0  # how much more than the disturbed rows ours may differ
_DENSITY = 1 / 16  # of the elements that are disturbed, by a whole rounding step
_N_ROUNDINGS = {torch.float32: 64.0}  # of a layer, in such steps; 1 in shorter dtypes
_MOE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Checkable(Protocol):
    """What the check needs of the replaced model."""

    step: ForwardContext

    def attach_kv(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None: ...

    def new_kv(self, n_pages: int, page_size: int) -> Sequence[Tensor]:
        """A cache of one kind for every layer, zeroed."""

    def embed(self, token_ids: Tensor) -> Tensor: ...

    def forward(self, embeddings: Tensor) -> Tensor: ...

    def run_modules(self, embeddings: Tensor) -> Tensor:
        """``forward`` through transformers' modules, however ``forward`` does it."""

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _States:
    """Of the rows of all prompts, one after the other."""

    layers: tuple[Tensor, ...]  # [n_rows, hidden_size], behind each decoder layer
    logits: Tensor  # [n_rows, vocab_size]


class Reference:
    """What transformers makes of the prompts. A few hundred kilobytes; holds no weights."""

    def __init__(
        self,
        token_ids: Tensor,  # [n_prompts, n_tokens]
        positions: Tensor,  # the same
        layer_names: tuple[str, ...],
        states: _States,
        tolerance: tuple[float, ...],  # of each layer, and of the logits; relative
        routes_experts: bool,
    ) -> None:
        self._token_ids, self._positions = token_ids, positions
        self._layer_names = layer_names
        self._states, self._tolerance = states, tolerance
        self._routes_experts = routes_experts

    @staticmethod
    def capture(model: PreTrainedModel, trace: ModelTrace) -> Reference:
        """Runs the instance, which must be as it was loaded, and leaves it so."""
        generator = torch.Generator().manual_seed(0)
        vocab_size = int(model.get_input_embeddings().weight.shape[0])
        n_tokens = min(_N_TOKENS, trace.max_positions)
        token_ids = torch.randint(vocab_size, (_N_PROMPTS, n_tokens), generator=generator)
        starts = torch.tensor([[0], [trace.max_positions - n_tokens]])
        positions = starts + torch.arange(n_tokens)
        token_ids, positions = token_ids.to(model.device), positions.to(model.device)
        rounding = _N_ROUNDINGS.get(model.dtype, 1.0) * float(torch.finfo(model.dtype).eps)
        with (
            torch.no_grad(),
            attention_as(model, "eager"),
            _disturbed(model, trace.layer_names, rounding),
        ):
            states, disturbed = _run(model, trace.layer_names, token_ids, positions)
        tolerance = tuple(
            _MARGIN * (_rms(_differences(a, b)) + rounding / 2)
            for a, b in zip(_stages(disturbed), _stages(states), strict=True)
        )
        config = model.config.get_text_config()
        routes = any((getattr(config, name, None) or 0) > 1 for name in _MOE)
        return Reference(token_ids, positions, trace.layer_names, states, tolerance, routes)

    def check(self, base: Checkable, model: nn.Module) -> None:
        """Raises UnsupportedBase where ``base``, made of ``model``, parts from transformers."""
        with torch.inference_mode():
            logits, _ = self._replay(base, model, base.forward, watch=False)
            if self._fits(len(self._tolerance) - 1, logits):
                return
            logits, layers = self._replay(base, model, base.run_modules, watch=True)
        for index, found in enumerate((*layers, logits)):
            if not self._fits(index, found):
                raise UnsupportedBase(self._describe(index, found))
        raise UnsupportedBase(
            "the fused layers answer otherwise than transformers' modules; serve it with --no-fuse"
        )

    def _fits(self, stage: int, found: Tensor) -> bool:
        """Whether rounding explains the difference of ``found`` to transformers.

        Each prompt's prefill and decode steps for themselves. Where tokens are routed to experts,
        rounding may send some elsewhere, so there only half of the rows have to fit.
        """
        differences = _differences(found, _stages(self._states)[stage]).view(_N_PROMPTS, -1)
        measure = _median if self._routes_experts else _rms
        return all(
            measure(row) <= self._tolerance[stage]
            for part in (
                differences[:, : self._n_prefilled],
                differences[:, self._n_prefilled :],
            )
            for row in part
            if len(row) > 0
        )

    def _describe(self, stage: int, found: Tensor) -> str:
        expected = _stages(self._states)[stage]
        differences = _differences(found, expected)
        row = int(differences.nan_to_num(torch.inf).argmax())
        column = int((found[row].float() - expected[row].float()).abs().nan_to_num(1e38).argmax())
        prompt, index = divmod(row, self._token_ids.shape[1])
        phase = "prefill" if index < self._n_prefilled else "decode"
        is_layer = stage < len(self._layer_names)
        where = f"behind {self._layer_names[stage]}" if is_layer else "in the logits"
        values = [float(states[row, column]) for states in (expected, found)]
        return (
            f"it answers otherwise here than in transformers. They part {where}: at position "
            f"{int(self._positions[prompt, index])} ({phase}) element {column} is {values[0]:.6g} "
            f"in transformers and {values[1]:.6g} here; the row differs by "
            f"{float(differences[row]):.2g} of its size, and rounding explains "
            f"{self._tolerance[stage]:.2g}. --no-self-check serves it nevertheless"
        )

    @property
    def _n_decoded(self) -> int:
        return min(_N_DECODED, self._token_ids.shape[1] - 1)

    @property
    def _n_prefilled(self) -> int:
        return self._token_ids.shape[1] - self._n_decoded

    def _replay(
        self,
        base: Checkable,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        *,
        watch: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of all rows and, if watched, the states behind each layer."""
        n_prompts, n_tokens = self._token_ids.shape
        n_pages = -(-n_tokens // _PAGE)
        base.attach_kv(
            base.new_kv(n_prompts * n_pages, _PAGE), base.new_kv(n_prompts * n_pages, _PAGE)
        )
        names = self._layer_names if watch else ()
        steps = [
            (0, self._n_prefilled),
            *((at, at + 1) for at in range(self._n_prefilled, n_tokens)),
        ]
        logits: list[Tensor] = []
        layers: list[list[Tensor]] = []
        for start, end in steps:
            _bind(base.step, self._positions[:, start:end], start, end, n_pages)
            with _watched(model, names) as seen:
                hidden = forward(base.embed(self._token_ids[:, start:end].reshape(-1)))
            logits.append(base.logits(hidden).view(n_prompts, end - start, -1))
            layers.append([seen[name].view(n_prompts, end - start, -1) for name in names])
        _unbind(base.step)
        of_layers = [torch.cat(parts, 1).flatten(0, 1) for parts in zip(*layers, strict=True)]
        return torch.cat(logits, 1).flatten(0, 1), of_layers


def _run(
    model: PreTrainedModel, layer_names: tuple[str, ...], token_ids: Tensor, positions: Tensor
) -> tuple[_States, _States]:
    """transformers' forward of the prompts, and of the same as the batch's second half."""
    twice = token_ids.repeat(2, 1)
    with _watched(model, layer_names) as seen:
        logits: Tensor = model(
            input_ids=twice,
            position_ids=positions.repeat(2, 1),
            attention_mask=torch.ones_like(twice),
            use_cache=False,
        ).logits
    halves = zip(*(seen[name].chunk(2) for name in layer_names), strict=True)
    clean, disturbed = (
        _States(tuple(layers), rows)
        for layers, rows in zip(halves, logits.flatten(0, 1).chunk(2), strict=True)
    )
    return clean, disturbed


def _stages(states: _States) -> tuple[Tensor, ...]:
    return (*states.layers, states.logits)


def _differences(found: Tensor, expected: Tensor) -> Tensor:
    """Of each row, relative to its size without what all elements have in common; float32."""
    a, b = found.float(), expected.float()
    centred = b - b.mean(-1, keepdim=True)
    size = torch.linalg.vector_norm(centred, dim=-1).clamp_min(1e-30)
    relative: Tensor = torch.linalg.vector_norm(a - b, dim=-1) / size
    return relative.nan_to_num(torch.inf)


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


def _median(differences: Tensor) -> float:
    return float(differences.median())


@contextlib.contextmanager
def _watched(model: nn.Module, layer_names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fills the dict with each layer's output [n_rows, hidden_size]."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            seen[name] = hidden.reshape(-1, hidden.shape[-1]).clone()

        return hook

    with contextlib.ExitStack() as stack:
        for name in layer_names:
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            stack.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def _disturbed(model: nn.Module, layer_names: Sequence[str], rounding: float) -> Iterator[None]:
    """In the batch's second half some elements of each layer's output are off by ``rounding``."""
    generator = torch.Generator().manual_seed(1)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        first = hidden.shape[0] // 2
        noise = torch.rand(hidden[first:].shape, generator=generator) / _DENSITY
        factor = torch.where(noise < 1, 1 + rounding * (noise - 0.5).sign(), 1.0).to(hidden)
        disturbed = torch.cat([hidden[:first], hidden[first:] * factor])
        return disturbed if isinstance(output, Tensor) else (disturbed, *output[1:])

    with contextlib.ExitStack() as stack:
        for name in layer_names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _bind(step: ForwardContext, positions: Tensor, start: int, end: int, n_pages: int) -> None:
    """Rows ``start`` to ``end`` of each prompt, whose pages follow each other."""
    n_prompts, device = positions.shape[0], positions.device
    places = torch.arange(start, end, device=device)
    first = torch.arange(n_prompts, device=device).unsqueeze(1) * (n_pages * _PAGE)
    table = torch.arange(n_prompts * n_pages, device=device, dtype=torch.int32)
    step.positions = positions.reshape(-1)
    step.slot_mapping = (first + places).reshape(-1)
    step.page_table = table.view(n_prompts, n_pages)
    starts = torch.arange(n_prompts + 1, device=device, dtype=torch.int32) * (end - start)
    step.query_starts = starts.to(torch.int32)
    step.kv_lens = torch.full((n_prompts,), end, dtype=torch.int32, device=device)
    step.logits_rows = None


def _unbind(step: ForwardContext) -> None:
    empty = ForwardContext()
    for name in ("positions", "slot_mapping", "page_table", "query_starts", "kv_lens"):
        setattr(step, name, getattr(empty, name))
