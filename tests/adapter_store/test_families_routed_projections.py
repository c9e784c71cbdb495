"""MoLA and LoRAMoE, in MoE-PEFT's files and their authors', against the published formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loraplex_adapter_store.errors import AdapterMismatch, AdapterRefused, MalformedFile
from loraplex_adapter_store.plan import Family
from tests.support.round_trip import Forward, check_logits, patched_logits
from tests.support.tiny_models import read_tensors, tiny_llama

ALPHA = 9
SIZES = {"q_proj": (32, 32), "up_proj": (32, 52), "down_proj": (52, 32)}
BLOCK = {"q_proj": "self_attn", "up_proj": "mlp", "down_proj": "mlp"}


class Projection:
    """One routed projection: a gate and its experts' factors, and what they compute."""

    def __init__(self, leaf: str, n_experts: int, rank: int, top_k: int | None) -> None:
        n_in, n_out = SIZES[leaf]
        self.gate = torch.randn(n_experts, n_in)
        self.a = torch.randn(n_experts, rank, n_in) * 0.3
        self.b = torch.randn(n_experts, n_out, rank) * 0.3
        self.scale, self.top_k = ALPHA / rank, top_k

    def forward(self, module: Any, x: Tensor) -> Tensor:
        p = torch.softmax(F.linear(x, self.gate), dim=-1)
        if self.top_k is not None:
            kept = p.topk(self.top_k, dim=-1)
            p = torch.zeros_like(p).scatter(
                -1, kept.indices, kept.values / kept.values.sum(dim=-1, keepdim=True)
            )
        y = F.linear(x, module.weight)
        for expert in range(len(self.gate)):
            delta = F.linear(F.linear(x, self.a[expert]), self.b[expert])
            y = y + self.scale * p[..., expert : expert + 1] * delta
        return y


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def projections(
    leaves: Sequence[str], n_experts: Sequence[int], ranks: Sequence[int], top_k: Sequence[Any]
) -> dict[tuple[int, str], Projection]:
    """One per layer and leaf; the other arguments hold a value for each of the three layers."""
    return {
        (layer, leaf): Projection(leaf, n_experts[layer], ranks[layer], top_k[layer])
        for layer in range(3)
        for leaf in leaves
    }


def named(
    routed: Mapping[tuple[int, str], Projection], prefix: str, gate: str, a: str, b: str
) -> dict[str, Tensor]:
    """The tensors of a file whose names ``gate``, ``a`` and ``b`` are, with {} for the expert."""
    tensors: dict[str, Tensor] = {}
    for (layer, leaf), projection in routed.items():
        at = f"{prefix}layers.{layer}.{BLOCK[leaf]}.{leaf}"
        tensors[f"{at}.{gate}"] = projection.gate
        for expert in range(len(projection.gate)):
            tensors[f"{at}.{a.format(expert)}"] = projection.a[expert]
            tensors[f"{at}.{b.format(expert)}"] = projection.b[expert]
    return tensors


def forwards(routed: Mapping[tuple[int, str], Projection]) -> dict[str, Forward]:
    return {
        f"model.layers.{layer}.{BLOCK[leaf]}.{leaf}": projection.forward
        for (layer, leaf), projection in routed.items()
    }


def moe_peft(family: str, routed: Mapping[tuple[int, str], Projection]) -> dict[str, Tensor]:
    experts = "experts.{}.lora_A.weight", "experts.{}.lora_B.weight"
    return named(routed, f"{family}.", "moe_gate.weight", *experts)


def moe_peft_config(family: str, leaves: Sequence[str], **values: Any) -> dict[str, Any]:
    return {
        "peft_type": family.upper(),
        "bias": "none",
        "r": 3,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": dict.fromkeys(leaves, True),
        "routing_strategy": family,
        "num_experts": 4,
        **values,
    }


def authors_config(leaves: Sequence[str], **values: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "bias": "none",
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": list(leaves),
        **values,
    }


@pytest.mark.parametrize("family", ["mola", "loramoe"])
def test_moe_peft_experts_serve_as_they_were_trained(family: str, tmp_path: Path) -> None:
    leaves = list(SIZES) if family == "mola" else ["up_proj", "down_proj"]
    routed = projections(leaves, [4] * 3, [3] * 3, [2 if family == "mola" else None] * 3)
    values = moe_peft_config(family, leaves, **({"top_k": 2} if family == "mola" else {}))
    model = tiny_llama()
    reading = read_tensors(values, moe_peft(family, routed), model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards(routed)))
    assert len(reading.plan.experts) == 3 * len(leaves)


def test_attention_of_a_moe_peft_loramoe_is_a_plain_lora(tmp_path: Path) -> None:
    routed = projections(["up_proj"], [4] * 3, [3] * 3, [None] * 3)
    tensors, expected = moe_peft("loramoe", routed), forwards(routed)
    for layer in range(3):
        a, b = torch.randn(3, 32) * 0.3, torch.randn(32, 3) * 0.3
        at = f"loramoe.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}

        def plain(module: nn.Module, x: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return module.__class__.forward(module, x) + ALPHA / 3 * F.linear(F.linear(x, a), b)

        expected[f"model.layers.{layer}.self_attn.q_proj"] = plain
    model = tiny_llama()
    values = moe_peft_config("loramoe", ["q_proj", "up_proj"])
    reading = read_tensors(values, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, expected))


@pytest.mark.parametrize("top_k", [2, [2, 1, 3]], ids=["one", "by layer"])
def test_mola_of_its_authors_has_experts_and_ranks_by_layer(top_k: Any, tmp_path: Path) -> None:
    by_layer = top_k if isinstance(top_k, list) else [top_k] * 3
    routed = projections(list(SIZES), [2, 4, 6], [2, 3, 2], by_layer)
    names = "router.router.weight", "lora_A_{}.weight", "lora_B_{}.weight"
    tensors = named(routed, "base_model.model.model.", *names)
    values = authors_config(list(SIZES), r=[2, 3, 2], top_k=top_k)
    model = tiny_llama()
    reading = read_tensors(values, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards(routed)))
    assert reading.plan.family is Family.MOLA


def test_mola_of_its_authors_without_top_k_asks_for_it(tmp_path: Path) -> None:
    routed = projections(["q_proj"], [2, 4, 6], [2] * 3, [2] * 3)
    names = "router.router.weight", "lora_A_{}.weight", "lora_B_{}.weight"
    tensors = named(routed, "base_model.model.model.", *names)
    with pytest.raises(MalformedFile, match='"top_k": 2'):
        read_tensors(authors_config(["q_proj"], r=[2] * 3), tensors, tiny_llama(), tmp_path)


def loramoe_of_its_authors(n_experts: int = 4) -> tuple[dict[str, Tensor], dict[str, Forward]]:
    routed = projections(["up_proj", "down_proj"], [n_experts] * 3, [3] * 3, [None] * 3)
    names = "lora_route.weight", "lora_A{}.weight", "lora_B{}.weight"
    return named(routed, "base_model.model.model.", *names), forwards(routed)


def test_loramoe_of_its_authors_serves_as_it_was_trained(tmp_path: Path) -> None:
    tensors, expected = loramoe_of_its_authors()
    values = authors_config(
        ["up_proj", "down_proj"], r=3, lora_nums=4, blc_alpha=0.1, blc_weight=0.1
    )
    model = tiny_llama()
    reading = read_tensors(values, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, expected))
    assert reading.plan.family is Family.LORAMOE


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("up_proj.lora_B2.weight", r"up_proj is incomplete: it lacks .*lora_B2\.weight"),
        ("down_proj.lora_route.weight", r"down_proj is incomplete: it lacks .*lora_A\.weight"),
    ],
)
def test_a_lost_tensor_is_named(lost: str, match: str, tmp_path: Path) -> None:
    tensors, _ = loramoe_of_its_authors()
    del tensors[f"base_model.model.model.layers.1.mlp.{lost}"]
    values = authors_config(["up_proj", "down_proj"], r=3, lora_nums=4)
    with pytest.raises(AdapterMismatch, match=match):
        read_tensors(values, tensors, tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"lora_nums": 5}, "has 4 experts, the config says lora_nums 5"),
        ({"r": [3, 3]}, "r lists 2 layers, model.layers.2"),
        ({"r": 4}, r"lora_A0\.weight.*\[3, 52\], the base needs \[4, 52\]"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    values: dict[str, Any], match: str, tmp_path: Path
) -> None:
    tensors, _ = loramoe_of_its_authors()
    said = authors_config(["up_proj", "down_proj"], **{"r": 3, "lora_nums": 4, **values})
    with pytest.raises(AdapterRefused, match=match):
        read_tensors(said, tensors, tiny_llama(), tmp_path)
