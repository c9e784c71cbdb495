"""Compares a served encoder with transformers' own forward before requests are served.

    capture   runs two texts of different lengths, padded, while all modules are transformers'
    check     runs the served encoder on both texts in one packed step

The first text is longer than the window of usual layers with local attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.rounding import (
    differences,
    disturbed,
    rms,
    rounding_of,
    tolerance_of,
)
from loraplex_server.model.tracing.call_recorder import attention_as

from .encoder import TowerInputs
from .layouts import ENCODERS
from .text_attention import text_groups

_LENGTHS = (160, 21)  # tokens of the texts, at most


class Checkable(Protocol):
    """The members of ``TextEncoder`` that the check uses."""

    step: ForwardContext
    device: torch.device
    spec: BaseSpec

    def forward(self, inputs: TowerInputs) -> Tensor: ...

    def pooled(self, hidden: Tensor, token_ids: Tensor) -> Tensor: ...

    def features(self, pooled: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class EncoderReference:
    """The states of transformers' forward. A few hundred kilobytes; holds no weights."""

    texts: tuple[Tensor, ...]  # token ids [n] of each
    states: tuple[Tensor, Tensor]  # hidden states of all tokens, features of each text
    tolerances: tuple[float, float]

    @staticmethod
    def capture(model: PreTrainedModel, max_positions: int) -> EncoderReference:
        """Run the loaded classifier, whose linear of labels is an identity. Leaves it unchanged."""
        generator = torch.Generator().manual_seed(0)
        pad = int(model.config.pad_token_id or 0)
        lengths = [min(length, max_positions) for length in _LENGTHS]
        n_ids = int(model.config.vocab_size)
        texts = tuple(
            torch.randint(n_ids, (length,), generator=generator).to(model.device)
            for length in lengths
        )
        for text in texts:
            text[text == pad] = (pad + 1) % n_ids
        layers = [name for name, module in model.named_modules() if _is_layer(model, name, module)]
        rounding = rounding_of(model.dtype)
        with (
            torch.no_grad(),
            attention_as(model, "eager"),
            disturbed(model, layers, rounding),
        ):
            clean, moved = _run(model, texts, pad)
        tolerances = [tolerance_of(b, a, rounding) for a, b in zip(clean, moved, strict=True)]
        return EncoderReference(texts, clean, (tolerances[0], tolerances[1]))

    def check(self, encoder: Checkable) -> None:
        """Raises UnsupportedBase if ``encoder`` answers differently from transformers."""
        step, device = encoder.step, encoder.device
        lengths = [len(text) for text in self.texts]
        step.positions = torch.cat([torch.arange(len(text), device=device) for text in self.texts])
        step.texts = text_groups(lengths, device)
        with torch.inference_mode():
            token_ids = torch.cat(self.texts)
            hidden = encoder.forward(TowerInputs(token_ids, torch.zeros_like(token_ids)))
            parts = torch.split(hidden, lengths)
            pooled = [encoder.pooled(*part) for part in zip(parts, self.texts, strict=True)]
            step.positions = step.positions[: len(pooled)]
            features = encoder.features(torch.stack(pooled))
        step.texts = ()
        names = ("the hidden states", "the inputs of the classifier")
        for name, found, expected, tolerance in zip(
            names, (hidden, features), self.states, self.tolerances, strict=True
        ):
            check_states(encoder.spec.model_id, name, found, expected, tolerance)


def check_states(
    model_id: str, name: str, found: Tensor, expected: Tensor, tolerance: float
) -> None:
    """Raises UnsupportedBase if ``found`` differs from transformers' states by too much.

    ``name``: of the states, in the plural.
    """
    off = rms(differences(found, expected))
    if off > tolerance:
        raise UnsupportedBase(
            f"the encoder {model_id!r} answers differently from transformers: {name} differ by "
            f"{off:.2g} of their size, and rounding explains {tolerance:.2g}. --no-self-check "
            "serves it nevertheless"
        )


def _is_layer(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    parent = name.rpartition(".")[0]
    if re.search(r"\.\d+\Z", name) is None:
        return False
    listed = model.get_submodule(parent)
    n_layers = int(model.config.num_hidden_layers)
    return isinstance(listed, nn.ModuleList) and len(listed) == n_layers


def _run(
    model: PreTrainedModel, texts: tuple[Tensor, ...], pad: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return hidden states and features, plain and with disturbed layers (second half)."""
    token_ids = nn.utils.rnn.pad_sequence([*texts, *texts], batch_first=True, padding_value=pad)
    mask = token_ids.ne(pad)
    seen: list[Tensor] = []
    trunk = model.get_submodule(ENCODERS[model.config.model_type].trunk)
    handle = trunk.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    try:
        features: Tensor = model(input_ids=token_ids, attention_mask=mask.long()).logits
    finally:
        handle.remove()
    (hidden,) = seen
    n = len(texts)
    clean, moved = (hidden[part][mask[part]] for part in (slice(n), slice(n, 2 * n)))
    return (clean, features[:n]), (moved, features[n:])
