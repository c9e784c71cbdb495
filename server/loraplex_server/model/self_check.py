"""Compares the served model with transformers' own forward before requests are served.

    capture   runs the loaded instance while all its modules are still transformers'
    check     runs the served model: a prefill of two prompts in one step, then decode steps

The second prompt is at the end of the context, where scaled positions differ most. The tolerance
comes from the model itself. Its own forward runs the prompts again while each layer's output is
disturbed by about the rounding error of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UnsupportedBase
from .layers.forward_context import ForwardContext
from .rounding import differences, disturbed, rms, rounding_of, tolerance_of, watched
from .tracing.call_recorder import attention_as
from .tracing.model_trace import ModelTrace

_N_PROMPTS = 2
_N_TOKENS = 20  # of a prompt
_N_DECODED = 3  # tokens that are decoded one by one
_PAGE = 16  # tokens of a page: a prompt crosses into its second
_MOE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Checkable(Protocol):
    """The methods of ``BaseModel`` that the check calls."""

    step: ForwardContext

    def attach_kv(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None: ...

    def new_kv(self, n_pages: int, page_size: int) -> Sequence[Tensor]: ...

    def embed(self, token_ids: Tensor) -> Tensor: ...

    def forward(self, embeddings: Tensor) -> Tensor: ...

    def run_modules(self, embeddings: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class Reference:
    """The states of transformers' forward. A few hundred kilobytes; holds no weights."""

    def __init__(
        self,
        token_ids: Tensor,  # [n_prompts, n_tokens]
        positions: Tensor,  # the same
        layer_names: tuple[str, ...],
        states: Sequence[Tensor],  # [n_rows, width] after each layer, then the logits
        tolerance: tuple[float, ...],  # relative, of each layer and of the logits
        routes_experts: bool,
    ) -> None:
        self._token_ids, self._positions = token_ids, positions
        self._layer_names = layer_names
        self._states, self._tolerance = states, tolerance
        self._routes_experts = routes_experts

    @staticmethod
    def capture(model: PreTrainedModel, trace: ModelTrace) -> Reference:
        """Run the loaded instance, which must be unchanged, and leave it unchanged."""
        generator = torch.Generator().manual_seed(0)
        vocab_size = int(model.get_input_embeddings().weight.shape[0])
        n_tokens = min(_N_TOKENS, trace.max_positions)
        token_ids = torch.randint(vocab_size, (_N_PROMPTS, n_tokens), generator=generator)
        starts = torch.tensor([[0], [trace.max_positions - n_tokens]])
        positions = starts + torch.arange(n_tokens)
        token_ids, positions = token_ids.to(model.device), positions.to(model.device)
        rounding = rounding_of(model.dtype)
        with (
            torch.no_grad(),
            attention_as(model, "eager"),
            disturbed(model, trace.layer_names, rounding),
        ):
            states, moved = _run(model, trace.layer_names, token_ids, positions)
        tolerance = tuple(tolerance_of(a, b, rounding) for a, b in zip(moved, states, strict=True))
        config = model.config.get_text_config()
        routes = any((getattr(config, name, None) or 0) > 1 for name in _MOE)
        return Reference(token_ids, positions, trace.layer_names, states, tolerance, routes)

    def check(self, base: Checkable, model: nn.Module) -> None:
        """Raises UnsupportedBase if ``base``, built from ``model``, differs from transformers."""
        with torch.inference_mode():
            logits, _ = self._replay(base, model, base.forward, watch=False)
            if self._fits(len(self._tolerance) - 1, logits):
                return
            logits, layers = self._replay(base, model, base.run_modules, watch=True)
        for stage, states in enumerate((*layers, logits)):
            if not self._fits(stage, states):
                raise UnsupportedBase(self._describe(stage, states))
        raise UnsupportedBase(
            "the fused layers answer differently from transformers' modules; use --no-fuse"
        )

    def _fits(self, stage: int, states: Tensor) -> bool:
        """Return True if rounding explains the differences of ``states`` to transformers.

        Each prompt's prefill and decode steps are judged apart. If the base routes tokens to
        experts, rounding may change the choice, so only half of the rows have to fit.
        """
        off = differences(states, self._states[stage]).view(_N_PROMPTS, -1)
        measure = torch.median if self._routes_experts else rms
        return all(
            measure(row) <= self._tolerance[stage]
            for part in (
                off[:, : self._n_prefilled],
                off[:, self._n_prefilled :],
            )
            for row in part
            if len(row) > 0
        )

    def _describe(self, stage: int, states: Tensor) -> str:
        expected = self._states[stage]
        off = differences(states, expected)
        row = int(off.nan_to_num(torch.inf).argmax())
        column = int((states[row].float() - expected[row].float()).abs().nan_to_num(1e38).argmax())
        prompt, index = divmod(row, self._token_ids.shape[1])
        phase = "prefill" if index < self._n_prefilled else "decode"
        is_layer = stage < len(self._layer_names)
        where = f"after {self._layer_names[stage]}" if is_layer else "in the logits"
        values = [float(rows[row, column]) for rows in (expected, states)]
        return (
            f"it answers differently from transformers. They differ first {where}: at position "
            f"{int(self._positions[prompt, index])} ({phase}) element {column} is {values[0]:.6g} "
            f"in transformers and {values[1]:.6g} here; the row differs by "
            f"{float(off[row]):.2g} of its size, and rounding explains "
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
        """Return the logits of all rows and, if watched, the states after each layer."""
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
            with watched(model, names) as seen:
                hidden = forward(base.embed(self._token_ids[:, start:end].reshape(-1)))
            logits.append(base.logits(hidden).view(n_prompts, end - start, -1))
            layers.append([seen[name].view(n_prompts, end - start, -1) for name in names])
        _unbind(base.step)
        of_layers = [torch.cat(parts, 1).flatten(0, 1) for parts in zip(*layers, strict=True)]
        return torch.cat(logits, 1).flatten(0, 1), of_layers


def _run(
    model: PreTrainedModel, layer_names: tuple[str, ...], token_ids: Tensor, positions: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Run transformers' forward on the prompts twice: plain, and disturbed (second half)."""
    twice = token_ids.repeat(2, 1)
    with watched(model, layer_names) as seen:
        logits: Tensor = model(
            input_ids=twice,
            position_ids=positions.repeat(2, 1),
            attention_mask=torch.ones_like(twice),
            use_cache=False,
        ).logits
    stages = [*(seen[name] for name in layer_names), logits.flatten(0, 1)]
    clean, moved = zip(*(stage.chunk(2) for stage in stages), strict=True)
    return list(clean), list(moved)


def _bind(step: ForwardContext, positions: Tensor, start: int, end: int, n_pages: int) -> None:
    """Bind rows ``start`` to ``end`` of each prompt. A prompt's pages are contiguous."""
    n_prompts, device = positions.shape[0], positions.device
    indices = torch.arange(start, end, device=device)
    first = torch.arange(n_prompts, device=device).unsqueeze(1) * (n_pages * _PAGE)
    table = torch.arange(n_prompts * n_pages, device=device, dtype=torch.int32)
    step.positions = positions.reshape(-1)
    step.slot_mapping = (first + indices).reshape(-1)
    step.page_table = table.view(n_prompts, n_pages)
    starts = torch.arange(n_prompts + 1, device=device, dtype=torch.int32) * (end - start)
    step.query_starts = starts.to(torch.int32)
    step.kv_lens = torch.full((n_prompts,), end, dtype=torch.int32, device=device)
    step.logits_rows = None


def _unbind(step: ForwardContext) -> None:
    empty = ForwardContext()
    for name in ("positions", "slot_mapping", "page_table", "query_starts", "kv_lens"):
        setattr(step, name, getattr(empty, name))
