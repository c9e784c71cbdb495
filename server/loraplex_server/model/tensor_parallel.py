"""How the linears of a base are cut over the ranks of a tensor-parallel group.

    q, k, v, gate, up   by outputs (heads, columns of the MLP): each rank reads all of x
    o, down             by inputs: each rank's product is a part of the sum that all need
    head                by outputs (tokens); rank 0 gathers them
    norms               held by all; the embedding by rank 0

As in Megatron-LM (https://arxiv.org/abs/1909.08053): two sums over the ranks in a layer. Where
there are fewer KV heads than ranks, each is held by several, as in vLLM.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig

from .errors import UnsupportedBase
from .forward_context import ForwardContext
from .fused_decoder import is_fusable

__all__ = ["Collective", "OtherRanks", "Shard", "ShardLayout"]

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUTS = ("o_proj", "down_proj")


class Collective(Protocol):
    """Calls that every rank makes in the same order. They return when the result may be used.

    Raise RuntimeError once a rank is gone.
    """

    def all_reduce(self, x: Tensor) -> None:
        """``x`` becomes the sum of all ranks' in place, with the same bits on each."""

    def broadcast(self, x: Tensor) -> None:
        """``x`` becomes that of rank 0 in place."""

    def gather(self, x: Tensor) -> list[Tensor]:
        """On rank 0 the tensors of all ranks, of equal shapes; empty elsewhere."""


class OtherRanks(Protocol):
    """Rank 0's way to have the others do what it does. Each call raises if one of them is gone."""

    def check(self) -> None:
        """What a step found is the sum of all ranks' parts, once this returns behind its end."""

    def attach_kv(self, n_pages: int, page_size: int) -> None:
        """They make a KV cache of so many pages."""

    def write_prefix(self, slots: Tensor, whole: Tensor) -> None:
        """They write their heads of ``whole`` [2, n_layers, n_tokens, n_kv_heads, head_dim], keys
        and values, to ``slots`` of the KV cache, int64 [n_tokens]."""

    def step(self, step: ForwardContext, embeddings: Tensor) -> AbstractContextManager[None]:
        """They run the layers while the context is open. An error within it ends them."""

    def head(self, x: Tensor) -> AbstractContextManager[None]:
        """They compute their tokens' logits of ``x`` while the context is open; the same holds."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Which rows or columns of each weight a rank holds. Equal widths on all ranks."""

    size: int  # ranks
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    output_head: str = "lm_head"

    @staticmethod
    def of(config: PretrainedConfig, size: int) -> ShardLayout:
        """Raises UnsupportedBase if the base cannot be cut over ``size`` ranks."""
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
        """Rows of the head that a rank computes; the last ones of the last rank may be padding."""
        return -(-self.vocab_size // self.size)

    def outputs(self, name: str, rank: int) -> slice | None:
        """The outputs of linear ``name`` that ``rank`` computes; None if each computes all."""
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
        """The inputs of linear ``name`` that ``rank`` has; None if each has all."""
        leaf = name.rpartition(".")[2]
        if leaf not in _BY_INPUTS:
            return None
        return self._part(self.n_heads * self.head_dim if leaf == "o_proj" else None, rank)

    def kv_heads(self, rank: int) -> slice:
        """Those that ``rank`` holds."""
        first = rank * self.n_kv_heads // self.size
        return slice(first, first + max(1, self.n_kv_heads // self.size))

    def is_cut(self, name: str) -> bool:
        """Whether ``name`` is a linear of a layer."""
        return name.rpartition(".")[2] in (*_BY_OUTPUTS, *_BY_INPUTS)

    def is_summed(self, name: str) -> bool:
        """Whether the ranks' outputs of linear ``name`` have to be added."""
        return name.rpartition(".")[2] in _BY_INPUTS

    def cut_weight(self, name: str, weight: Tensor, rank: int) -> Tensor:
        """The rank's view of a linear's weight [out, in]."""
        outputs, inputs = self.outputs(name, rank), self.inputs(name, rank)
        return weight[outputs or slice(None), inputs or slice(None)]

    def cut_bias(self, name: str, bias: Tensor | None, rank: int) -> Tensor | None:
        """The rank's view of what linear ``name`` adds, [out]; of a sum rank 0 adds it once."""
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
    """One rank's place in its group."""

    layout: ShardLayout
    rank: int
    collective: Collective
    others: OtherRanks | None = None  # of rank 0: whom it leads
