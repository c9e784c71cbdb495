"""An encoder as the engine sees it: towers that read texts or images, and the adapted modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import HeadPlan
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.layers.packed_lora_linear import PackedLoraLinear
from loraplex_server.model.layers.routed import RoutedMlp


class Modality(Enum):
    """The input of a tower."""

    TEXT = "text"
    IMAGE = "image"


class TowerInputs(NamedTuple):
    """The inputs of one tower in a step, whose rows are those of all texts or images in order."""

    token_ids: Tensor  # int64 [T]; of images without meaning
    token_types: Tensor  # int64 [T]; 1 for tokens of the second text of a pair
    images: tuple[Tensor, ...] = ()  # pixels [channels, height, width] of each


class Tower(Protocol):
    """A part of an encoder that reads texts or images. Rows and adapters are those of the step."""

    # True if an embedding is the features of a request, and not one of its hidden states
    embeds_features: bool
    # True if the classifier reads the features of every row where it classifies tokens
    classifies_tokens_by_features: bool

    def forward(self, inputs: TowerInputs) -> Tensor:
        """Return the hidden states [T, width] of all texts or images in ``inputs``."""

    def pooled(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Return what the features of one text or image depend on, of its rows ``hidden``.

        ``hidden`` [n, width], ``token_ids`` [n]. The result has the same shape for all.
        """

    def features(self, pooled: Tensor) -> Tensor:
        """Return the features [n, n_features] of the stacked ``pooled`` of n requests.

        The step has one row for each request.
        """


class Encoder(ABC):
    """A frozen encoder whose modules apply adapters. Engine thread only after the build.

    There is no KV cache: a text or an image is one chunk.
    """

    shard = None  # it is not cut over several ranks
    stacked: frozenset[str] = frozenset()  # it has no experts
    mlps: Mapping[str, RoutedMlp] = MappingProxyType({})
    eos_token_ids: frozenset[int] = frozenset()

    step: ForwardContext
    spec: BaseSpec
    groups: Mapping[str, PackedLoraLinear]
    norms: frozenset[str]  # names
    embeddings: frozenset[str]  # names
    towers: Mapping[Modality, Tower]
    head_plan: HeadPlan | None  # the checkpoint's own classifier
    lacking: frozenset[str]  # modules before the classifier that the checkpoint does not have
    max_positions: int  # rows of a text or an image
    dtype: torch.dtype
    device: torch.device

    @property
    def routable(self) -> frozenset[str]:
        """The names of projections that may have experts."""
        return frozenset(self.spec.modules) - self.spec.optional

    def attach_pool(self, pool: LoraPool) -> None:
        """Make the linears apply the pool's adapters."""
        for group in self.groups.values():
            group.lora = PreparedTarget(pool, group.target.name)

    @abstractmethod
    def probe_inputs(self) -> tuple[Modality, TowerInputs]:
        """Return the smallest input of one tower."""
