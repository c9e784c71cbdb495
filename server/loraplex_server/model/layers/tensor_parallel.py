"""The layout of a base that is cut over the ranks of a tensor-parallel group.

    q, k, v, gate, up   by outputs (heads, columns of the MLP): each rank reads all of x
    o, down             by inputs: the ranks' products are summed
    head                by outputs (tokens): rank 0 gathers them
    norms               on all ranks; the embedding on rank 0

As in Megatron-LM (https://arxiv.org/abs/1909.08053), a layer has two sums over the ranks. If there
are fewer KV heads than ranks, several ranks have the same head, as in vLLM.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_server.model.errors import UnsupportedBase

from .collective import Collective
from .forward_context import ForwardContext
from .fused_decoder import is_fusable

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUTS = ("o_proj", "down_proj")


class OtherRanks(Protocol):
    """The other ranks, which rank 0 leads. Each call raises if a rank is gone."""

    def check(self) -> None:
        """Raises if a rank was lost. Called after a step, whose results are valid otherwise."""

    def attach_kv(self, n_pages: int, page_size: int) -> None:
        """Creates a KV cache on every rank."""

    def write_prefix(self, slots: Tensor, whole: Tensor) -> None:
        """Writes keys and values ``whole`` [2, n_layers, n_tokens, n_kv_heads, head_dim] to the
        KV ``slots`` int64 [n_tokens]; each rank writes its own heads."""

    def step(self, step: ForwardContext, embeddings: Tensor) -> AbstractContextManager[None]:
        """Runs the layers on every rank while the context is open; an error loses the ranks."""

    def head(self, x: Tensor) -> AbstractContextManager[None]:
        """Computes every rank's logits of ``x`` while the context is open, as ``step``."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The rows or columns of each weight on each rank. Widths are equal on all ranks."""

    size: int  # ranks
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    output_head: str = "lm_head"

    @staticmethod
    def of(config: PretrainedConfig, size: int) -> ShardLayout:
        """Return the layout. Raises UnsupportedBase if ``size`` ranks cannot share the base."""
        if not is_fusable(config):
            raise UnsupportedBase(
                f"a base of type {config.model_type!r} is not cut over several processes yet; "
                "serve it without --tensor-parallel-size"
            )
        layout = ShardLayout(
            size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
        )
        layout._check()
        return layout

    @property
    def tokens_of_a_rank(self) -> int:
        """The rows of the head on a rank; the last rank's may end with padding."""
        return -(-self.vocab_size // self.size)

    def outputs(self, name: str, rank: int) -> slice | None:
        """Return the outputs of linear ``name`` on ``rank``; None if each rank has all."""
        if name == self.output_head:
            first = rank * self.tokens_of_a_rank
            return slice(first, min(first + self.tokens_of_a_rank, self.vocab_size))
        leaf = name.rpartition(".")[2]
        if leaf not in _BY_OUTPUTS:
            return None
        if leaf in ("k_proj", "v_proj"):
            heads = self.kv_heads(rank)
            return slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        return self._part(self.n_heads * self.head_dim if leaf == "q_proj" else None, rank)

    def inputs(self, name: str, rank: int) -> slice | None:
        """Return the inputs of linear ``name`` on ``rank``; None if each rank has all."""
        leaf = name.rpartition(".")[2]
        if leaf not in _BY_INPUTS:
            return None
        return self._part(self.n_heads * self.head_dim if leaf == "o_proj" else None, rank)

    def kv_heads(self, rank: int) -> slice:
        """Return the KV heads of ``rank``."""
        first = rank * self.n_kv_heads // self.size
        return slice(first, first + max(1, self.n_kv_heads // self.size))

    def is_cut(self, name: str) -> bool:
        """Return True if ``name`` is a linear of a layer."""
        return name.rpartition(".")[2] in (*_BY_OUTPUTS, *_BY_INPUTS)

    def is_summed(self, name: str) -> bool:
        """Return True if the ranks' outputs of linear ``name`` are summed."""
        return name.rpartition(".")[2] in _BY_INPUTS

    def cut_weight(self, name: str, weight: Tensor, rank: int) -> Tensor:
        """Return the rank's view of a linear's weight [out, in]."""
        outputs, inputs = self.outputs(name, rank), self.inputs(name, rank)
        return weight[outputs or slice(None), inputs or slice(None)]

    def cut_bias(self, name: str, bias: Tensor | None, rank: int) -> Tensor | None:
        """Return the rank's view of a bias [out]. Only rank 0 adds the bias of summed outputs."""
        if bias is None or (self.is_summed(name) and rank > 0):
            return None
        return bias[self.outputs(name, rank) or slice(None)]

    def _part(self, width: int | None, rank: int) -> slice:
        part = (width or self.intermediate_size) // self.size
        return slice(rank * part, (rank + 1) * part)

    def _check(self) -> None:
        size, remedy = self.size, "choose another --tensor-parallel-size"
        for what, n in (
            ("attention heads", self.n_heads),
            ("columns in the MLP", self.intermediate_size),
        ):
            if n % size:
                raise UnsupportedBase(
                    f"this base has {n} {what}, which {size} processes cannot share evenly; "
                    + remedy
                )
        if self.n_kv_heads % size and size % self.n_kv_heads:
            raise UnsupportedBase(
                f"this base has {self.n_kv_heads} KV heads: {size} processes can neither share "
                f"them evenly nor hold each as often; {remedy}"
            )
        if (size - 1) * self.tokens_of_a_rank >= self.vocab_size:
            raise UnsupportedBase(f"the vocabulary is too small for {size} processes; {remedy}")


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank of a tensor-parallel group, and its connection to the other ranks."""

    layout: ShardLayout
    rank: int
    collective: Collective
    others: OtherRanks | None = None  # set on rank 0 only


class GatheredHead(BaseLinear):
    """A head over all ranks, called on rank 0. It has no readable weight."""

    def __init__(self, own: BaseLinear, shard: Shard) -> None:
        """``own``: the head of this rank's tokens."""
        super().__init__([shard.layout.vocab_size], own.in_features, own.dtype)
        self._own, self._shard = own, shard

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the logits of ``x`` to ``out``. Rank 0."""
        others = self._shard.others
        if others is None:
            raise RuntimeError("only rank 0 asks for logits")
        rows = x.contiguous()
        with others.head(rows):
            parts = self.compute(rows)
        out.copy_(torch.cat(parts, dim=1)[:, : self.n_out])

    def compute(self, x: Tensor) -> list[Tensor]:
        """Compute this rank's logits of rank 0's ``x`` and gather all on rank 0. All ranks."""
        collective, width = self._shard.collective, self._shard.layout.tokens_of_a_rank
        collective.broadcast(x)
        own = self._own(x)
        return collective.gather(functional.pad(own, (0, width - own.shape[1])).contiguous())

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        self.into(x, out)

    def embed(self, token_ids: Tensor) -> Tensor:
        raise RuntimeError("no rank has the whole head")

    @property
    def n_bytes(self) -> int:
        return self._own.n_bytes
