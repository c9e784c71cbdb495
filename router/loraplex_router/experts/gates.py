"""Gates: from the logits (or the hidden state) of a row to its experts and their weights.

    top-k    (MixLoRA, MoLA)   p = softmax(W h);  T = top-k(p);  w_e = p_e / Σ_{j∈T} p_j
    top-p    (mixlora-dynamic) experts by falling p, up to and including the first that lifts the
                               running sum above top_p; weights stay p_e, they are not renormalised
    switch   (mixlora-switch)  e = argmax p;  w_e = p_e
    dense    (LoRAMoE)         every expert;  w = p
    arrow    (Arrow)           s_e = |v_e · x|;  T = top-k(s);  w = softmax over T of s

All of it in float32, whatever the dtype of the rows: in bfloat16 close gates flip between experts.
Equal logits go to the lower expert index. Nothing here waits for the device: shapes depend on the
arguments alone, and an expert that a row does not use is -1 with weight 0.

``mixlora-switch`` follows the formula the adapters are *trained* with. The public implementation
returns the block's input unchanged at inference, so that FFN and experts are skipped; an adapter
served that way is not the adapter that was trained. Training also caps the tokens an expert takes
per sequence (``expert_capacity``) and passes the others through as ``p·h``; a cap makes a token's
output depend on how many earlier tokens share its step, so a server that splits prompts into
chunks, or takes them from a prefix cache, cannot apply it. Served experts have no cap, as one-token
decoding steps never had.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_kernels.lora.experts import route_top_k, top_k_of

NO_EXPERT = -1


class Routing(NamedTuple):
    """The experts of each row. The strategy fixes ``k``; see ``experts_per_row``."""

    expert_index: Tensor  # int32 [n_rows, k]; NO_EXPERT where fewer than k are used
    weight: Tensor  # float32 [n_rows, k]; 0 where there is no expert


def experts_per_row(strategy: RoutingStrategy, n_experts: int, top_k: int) -> int:
    """The fixed width of a ``Routing``: top-p and dense may use every expert."""
    match strategy:
        case RoutingStrategy.TOP_K | RoutingStrategy.ARROW:
            if not 1 <= top_k <= n_experts:
                raise ValueError(f"top_k is {top_k}, must be in 1…{n_experts} (the experts)")
            return top_k
        case RoutingStrategy.SWITCH:
            return 1
        case RoutingStrategy.TOP_P | RoutingStrategy.DENSE:
            return n_experts


def route(
    hidden: Tensor,  # [n_rows, hidden_size]
    gate: Tensor,  # float32 [n_experts, hidden_size]
    strategy: RoutingStrategy,
    *,
    top_k: int,
    top_p: float,
) -> Routing:
    """Reads the rows' hidden states, multiplies by the gate and applies the strategy."""
    if strategy is RoutingStrategy.TOP_K:
        experts_per_row(strategy, gate.shape[0], top_k)
        return Routing(*route_top_k(hidden, gate, top_k))
    logits = torch.mm(hidden.float(), gate.T)  # [n_rows, n_experts]
    match strategy:
        case RoutingStrategy.TOP_P:
            return gate_top_p(logits, top_p)
        case RoutingStrategy.SWITCH:
            return gate_switch(logits)
        case RoutingStrategy.DENSE:
            return gate_dense(logits)
        case RoutingStrategy.ARROW:
            return gate_arrow(logits, top_k)


def gate_top_k(logits: Tensor, top_k: int) -> Routing:
    """Softmax over all experts, keep k, renormalise: the same as softmax over the k logits."""
    experts_per_row(RoutingStrategy.TOP_K, logits.shape[-1], top_k)
    return Routing(*top_k_of(logits.float(), top_k))


def gate_top_p(logits: Tensor, top_p: float) -> Routing:
    """Keeps the experts whose predecessors sum to at most ``top_p``, with their bare p."""
    p, index = _descending(torch.softmax(logits.float(), dim=-1))
    dropped = p.cumsum(dim=-1) - p > top_p
    # The difference above rounds; the first expert is kept by definition.
    dropped[:, 0] = False
    return Routing(index.int().masked_fill(dropped, NO_EXPERT), p.masked_fill(dropped, 0.0))


def gate_switch(logits: Tensor) -> Routing:
    """Choose the best expert, weighted by its probability."""
    weight, index = _descending(torch.softmax(logits.float(), dim=-1))
    return Routing(index[:, :1].int(), weight[:, :1])


def gate_dense(logits: Tensor) -> Routing:
    """Choose every expert, weighted by its probability."""
    weight = torch.softmax(logits.float(), dim=-1)
    index = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    return Routing(index.expand(logits.shape[0], -1), weight)


def gate_arrow(products: Tensor, top_k: int) -> Routing:
    """Choose by softmax over the k largest |v·x|. A prototype's sign has no meaning.

    Divide the prototypes by the temperature, if there is one.
    """
    return gate_top_k(products.abs(), top_k)


def _descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    values, index = torch.sort(scores.float(), dim=-1, descending=True, stable=True)
    return values, index


def arrow_prototypes(factors: Sequence[tuple[Tensor, Tensor]], temperature: float = 1.0) -> Tensor:
    """Stacks one prototype per LoRA: float32 [n_experts, in_features], the gate of ``gate_arrow``.

    Arrow routes over a library of plain LoRAs without any training. The prototype of a LoRA is the
    input direction that it amplifies most, the top right singular vector of BA. A token goes to the
    LoRAs whose direction it is most aligned with.

    ``factors`` are pairs (b [out, rank], a [rank, in]); ranks may differ. Dividing by the
    temperature scales every |v·x| alike, which is softmax's temperature.
    """
    if not factors:
        raise ValueError("Arrow needs at least one LoRA, got none")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
    return torch.stack([top_right_singular_vector(b, a) for b, a in factors]) / temperature


def top_right_singular_vector(b: Tensor, a: Tensor) -> Tensor:
    """The unit vector v that maximises |B A v|, float32 [in_features]; exact, not iterated.

    BA is never formed. With Aᵀ = QR, BA = (B Rᵀ) Qᵀ, so v = Q u for the top right singular vector
    u of B Rᵀ, which the [rank, rank] matrix R BᵀB Rᵀ yields. The sign is fixed (largest component
    positive). A zero product has no direction and gives zeros: such a LoRA attracts no token.
    """
    q, r = torch.linalg.qr(a.double().T)  # [in, rank], [rank, rank]
    gram = r @ (b.double().T @ b.double()) @ r.T
    values, vectors = torch.linalg.eigh(gram)  # ascending
    if float(values[-1]) <= 0.0:
        return torch.zeros(a.shape[1], dtype=torch.float32)
    v: Tensor = q @ vectors[:, -1]
    return (v * torch.sign(v[v.abs().argmax()])).float()
