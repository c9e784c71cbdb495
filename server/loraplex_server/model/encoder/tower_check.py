"""Compares the towers of an image encoder with transformers' own forward.

capture   runs images and texts, one by one, while all modules are transformers'
check     runs the served towers on all images, and on all texts, in one packed step each
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.rounding import disturbed, rounding_of, tolerance_of
from loraplex_server.model.tracing.call_recorder import attention_as

from .encoder import Modality, Tower, TowerInputs
from .encoder_check import check_states
from .image_layouts import ImageLayout
from .text_attention import text_groups

_TEXT_TOKENS = (24, 9)  # of the texts, at most
_N_IMAGES = 2


class Checkable(Protocol):
    """The members of ``ImageEncoder`` that the check uses."""

    step: ForwardContext
    device: torch.device
    spec: BaseSpec
    towers: Mapping[Modality, Tower]


class _Case(NamedTuple):
    """An image or a text, and what transformers makes of it."""

    value: Tensor  # pixels [channels, height, width], or token ids [n]
    states: tuple[Tensor, Tensor]  # hidden states [n, width], features [n_features]
    tolerances: tuple[float, float]


@dataclass(frozen=True, slots=True)
class TowerReference:
    """The states of transformers' forward. A few megabytes; holds no weights."""

    cases: Mapping[Modality, tuple[_Case, ...]]

    @staticmethod
    def capture(
        model: PreTrainedModel, layout: ImageLayout, image_size: tuple[int, int]
    ) -> TowerReference:
        """Run the loaded model, whose classifier is an identity. Leaves it unchanged."""
        generator = torch.Generator().manual_seed(0)
        shape = (3, *image_size)
        images = [torch.randn(shape, generator=generator) for _ in range(_N_IMAGES)]
        values = {Modality.IMAGE: [image.to(model.device, model.dtype) for image in images]}
        if Modality.TEXT in layout.trunks:
            values[Modality.TEXT] = [
                text.to(model.device) for text in _texts(model, layout, generator)
            ]
        with torch.no_grad(), attention_as(model, "eager"):
            return TowerReference(
                {
                    modality: tuple(_run(model, layout, modality, value) for value in of_tower)
                    for modality, of_tower in values.items()
                }
            )

    def check(self, encoder: Checkable) -> None:
        """Raises UnsupportedBase if ``encoder`` answers differently from transformers."""
        for modality, cases in self.cases.items():
            found = _served(encoder, modality, cases)
            for case, states in zip(cases, found, strict=True):
                names = (
                    f"the hidden states of {modality.value}s",
                    f"the features of {modality.value}s",
                )
                for name, state, expected, tolerance in zip(
                    names, states, case.states, case.tolerances, strict=True
                ):
                    model_id = encoder.spec.model_id
                    check_states(model_id, name, state, expected, tolerance)


def _texts(
    model: PreTrainedModel, layout: ImageLayout, generator: torch.Generator
) -> Iterator[Tensor]:
    config = model.config.text_config
    longest, n_ids = int(config.max_position_embeddings), int(config.vocab_size)
    for length in _TEXT_TOKENS:
        n_tokens = longest if layout.pads_texts else min(length, longest)
        text = torch.randint(n_ids, (n_tokens,), generator=generator)
        text[-1] = min(int(config.eos_token_id), n_ids - 1)
        yield text


def _run(model: PreTrainedModel, layout: ImageLayout, modality: Modality, value: Tensor) -> _Case:
    """Run ``value`` twice in one batch, the second time with disturbed layers."""
    layers = [
        f"{name}.{index}"
        for name in layout.layers
        for index in range(len(model.get_submodule(name)))
    ]
    rounding = rounding_of(model.dtype)
    twice = torch.stack((value, value))
    with disturbed(model, layers, rounding), _hidden_states(model, layout, modality) as hidden:
        features = _features(model, layout, modality, twice)
    states = [hidden[0][0], features[0]], [hidden[0][1], features[1]]
    tolerances = [tolerance_of(b, a, rounding) for a, b in zip(*states, strict=True)]
    return _Case(value, (states[0][0], states[0][1]), (tolerances[0], tolerances[1]))


@contextlib.contextmanager
def _hidden_states(
    model: PreTrainedModel, layout: ImageLayout, modality: Modality
) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    trunk: nn.Module = model.get_submodule(layout.trunks[modality])
    handle = trunk.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


def _features(
    model: PreTrainedModel, layout: ImageLayout, modality: Modality, batch: Tensor
) -> Tensor:
    features: Tensor
    if layout.classifier:
        features = model(pixel_values=batch).logits
    elif modality is Modality.IMAGE:
        features = model.get_image_features(pixel_values=batch).pooler_output
    else:
        features = model.get_text_features(input_ids=batch).pooler_output
    return features


def _served(
    encoder: Checkable, modality: Modality, cases: tuple[_Case, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Return hidden states and features of all cases, computed in one step."""
    step, device, tower = encoder.step, encoder.device, encoder.towers[modality]
    lengths = [len(case.states[0]) for case in cases]
    values = tuple(case.value for case in cases)
    step.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    step.texts = text_groups(lengths, device)
    is_text = modality is Modality.TEXT
    token_ids = torch.cat(values) if is_text else torch.zeros_like(step.positions)
    inputs = TowerInputs(token_ids, torch.zeros_like(token_ids), () if is_text else values)
    with torch.inference_mode():
        hidden = torch.split(tower.forward(inputs), lengths)
        ids = torch.split(token_ids, lengths)
        pooled = torch.stack([tower.pooled(*part) for part in zip(hidden, ids, strict=True)])
        step.positions = step.positions[: len(cases)]
        features = tower.features(pooled)
    step.texts = ()
    return list(zip(hidden, features, strict=True))
