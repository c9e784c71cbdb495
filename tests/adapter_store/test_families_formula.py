"""Round trips of methods that PEFT does not have, against modules written from their formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loraplex_adapter_store.errors import AdapterRefused, UnsupportedAdapter
from loraplex_adapter_store.families.abmll import draws
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import Family
from tests.support.plan_executor import plan_logits
from tests.support.round_trip import Forward, check_logits, patched_logits
from tests.support.tiny_models import PROMPT, read_tensors, tiny_llama, untouched

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.2.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
MODULES = (Q, UP, DOWN)


def randn(*shape: int, std: float = 0.2) -> Tensor:
    return torch.randn(*shape) * std


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def shapes(name: str) -> tuple[int, int]:
    """(in, out) of a module of the tiny model."""
    weight = tiny_llama().get_submodule(name).weight
    return weight.shape[1], weight.shape[0]


def lora_config(**values: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(MODULES), **values}


def additive(scale: float, *factors: Tensor) -> Forward:
    """y = W x + scale · (last … first) x, with factors as linears' weights in order of use."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        hidden = x
        for factor in factors:
            hidden = F.linear(hidden, factor)
        return F.linear(x, module.weight) + scale * hidden

    return forward


@pytest.mark.parametrize(
    ("core_name", "family"),
    [
        ("lora_R.weight", Family.LORA_SB),
        ("lora_N.weight", Family.NLORA),
        ("lora_S.weight", Family.LAMDA),
        ("default_lora_latent_mapping.weight", Family.LORA_XS),
    ],
    ids=["LoRA-SB", "NLoRA / IntTune", "LaMDA", "LoRA-XS"],
)
def test_a_core_matrix_between_the_factors_folds(
    core_name: str, family: Family, tmp_path: Path
) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    for name in MODULES:
        n_in, n_out = shapes(name)
        a, core, b = randn(4, n_in), randn(4, 4, std=1.0), randn(n_out, 4)
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": a,
            f"{PREFIX}{name}.lora_B.weight": b,
            f"{PREFIX}{name}.{core_name}": core,
        }
        forwards[name] = additive(6 / 4, a, core, b)
    reading = read_tensors(lora_config(), tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))
    assert reading.plan.family is family


def test_lamda_with_different_ranks_per_layer_folds(tmp_path: Path) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    ranks = {Q: 2, UP: 6, DOWN: 3}
    for name, rank in ranks.items():
        n_in, n_out = shapes(name)
        a, core, b = randn(rank, n_in), randn(rank, rank, std=1.0), randn(n_out, rank)
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": a,
            f"{PREFIX}{name}.lora_B.weight": b,
            f"{PREFIX}{name}.lora_S.weight": core,
        }
        forwards[name] = additive(6 / rank, a, core, b)
    config = lora_config(rank_pattern=ranks)
    reading = read_tensors(config, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))
    assert {name: plan.rank for name, plan in reading.plan.modules.items()} == ranks


@pytest.mark.parametrize("kind", ["lora_ga", "corda", True], ids=["LoRA-GA", "CorDA", "LaMDA init"])
def test_initial_factors_put_a_residual_trained_lora_on_the_clean_base(
    kind: str | bool, tmp_path: Path
) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    for name in MODULES:
        n_in, n_out = shapes(name)
        a, b, a0, b0 = randn(4, n_in), randn(n_out, 4), randn(4, n_in), randn(n_out, 4)
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": a,
            f"{PREFIX}{name}.lora_B.weight": b,
            f"{PREFIX}{name}.lora_A0.weight": a0,
            f"{PREFIX}{name}.lora_B0.weight": b0,
        }
        forwards[name] = residual(model.get_submodule(name).weight, 6 / 4, a, b, a0, b0)
    config = lora_config(init_lora_weights=kind)
    reading = read_tensors(config, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))
    bare = {name: t for name, t in tensors.items() if "0.weight" not in name}
    if isinstance(kind, str):
        with pytest.raises(UnsupportedAdapter, match="initial factors"):
            read_tensors(config, bare, model, tmp_path)


def residual(weight: Tensor, scale: float, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Forward:
    base = weight.detach() - scale * b0 @ a0
    return lambda module, x: F.linear(x, base) + scale * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("base_residual", [False, True], ids=["released code", "paper"])
def test_nystrom_lora_says_whether_its_base_was_replaced(
    base_residual: bool, tmp_path: Path
) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    for name in MODULES:
        n_in, n_out = shapes(name)
        weight = model.get_submodule(name).weight.detach()
        a, core, b = randn(4, n_in), randn(4, 4, std=1.0), randn(n_out, 4)
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": a,
            f"{PREFIX}{name}.lora_B.weight": b,
            f"{PREFIX}{name}.lora_N.weight": core,
        }
        base = weight
        if base_residual:
            start = weight[:, :4] @ torch.linalg.pinv(weight[:4, :4]) @ weight[:4]
            base = weight - 6 / 4 * start
        forwards[name] = lambda module, x, base=base, a=a, core=core, b=b: (
            F.linear(x, base) + 6 / 4 * F.linear(F.linear(F.linear(x, a), core), b)
        )
    config = lora_config(init_lora_weights="n_lora", base_residual=base_residual)
    reading = read_tensors(config, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))


def test_comp_lora_keeps_the_principal_directions_clear(tmp_path: Path) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    for name in MODULES:
        n_in, n_out = shapes(name)
        v = torch.linalg.svd(model.get_submodule(name).weight.detach())[2][:5]
        a, b = randn(4, n_in), randn(n_out, 4)
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": a,
            f"{PREFIX}{name}.lora_B.weight": b,
            f"{PREFIX}{name}.comp_projector.weight": v,
        }
        complement = torch.eye(n_in) - v.t() @ v
        forwards[name] = additive(6 / 4, complement, a, b)
    reading = read_tensors(lora_config(), tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))


@pytest.mark.parametrize("spelling", ["lora.lora_A lora.lora_B lora.gate", "lora_A lora_B gate"])
def test_sora_drops_the_ranks_its_gates_closed(spelling: str, tmp_path: Path) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    names = spelling.split()
    for name in MODULES:
        n_in, n_out = shapes(name)
        a, b, gate = randn(8, n_in), randn(n_out, 8), randn(1, 8, std=1.0)
        gate[0, [1, 2, 5]] = 0
        tensors |= {f"{name}.{key}": t for key, t in zip(names, (a, b, gate), strict=True)}
        forwards[name] = lambda module, x, a=a, b=b, gate=gate: (
            F.linear(x, module.weight) + ((x @ a.T) * gate) @ b.T * (6 / 8)
        )
    config = lora_config(peft_type="SORA", r=8)
    reading = read_tensors(config, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))
    assert {plan.rank for plan in reading.plan.modules.values()} == {5}


@pytest.mark.parametrize("method", ["lu", "ones", "constant", "uniform"])
def test_loldu_folds_to_rank_r_on_the_clean_base(method: str, tmp_path: Path) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    rank, alpha = 6, 8
    for name in MODULES:
        weight = model.get_submodule(name).weight.detach()
        p, lower, upper = torch.linalg.lu(weight)
        d = torch.diagonal(upper)
        unit = (upper[: d.numel()] / d.unsqueeze(1))[:rank]
        start = {"lu": d[:rank], "ones": d[:rank], "constant": d[:rank].mean().expand(rank)}.get(
            method, randn(rank, std=1.0)
        )
        z, sigma = d[:rank] + randn(rank, std=1.0), torch.tensor(1.7)
        base = weight - alpha / rank * p @ lower[:, :rank] @ torch.diag(start) @ unit
        trained = base + sigma * p @ lower[:, :rank] @ torch.diag(z) @ unit
        nested = f"{name}.parametrizations.weight"
        tensors |= {f"{nested}.0.vector_z": z, f"{nested}.0.scaling_factor": sigma}
        tensors |= {f"{nested}.original": base, f"{nested}.0.P": p}
        if method == "uniform":
            tensors[f"{nested}.0.vector_z0"] = start
        forwards[name] = lambda module, x, trained=trained: F.linear(x, trained)
    config = lora_config(peft_type="LOLDU", r=rank, lora_alpha=alpha, init_method=method)
    reading = read_tensors(config, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))
    assert {plan.rank for plan in reading.plan.modules.values()} == {rank}


def test_loldu_that_started_at_random_is_refused_without_its_start(tmp_path: Path) -> None:
    tensors = {f"{Q}.vector_z": randn(4), f"{Q}.scaling_factor": torch.tensor(1.0)}
    config = lora_config(peft_type="LOLDU", init_method="normal", target_modules=[Q])
    with pytest.raises(UnsupportedAdapter, match="vector_z0"):
        read_tensors(config, tensors, tiny_llama(), tmp_path)


@pytest.mark.parametrize("scaled", [False, True], ids=["offsets", "offsets and scales"])
def test_lofit_heads_become_a_bias_and_an_input_scale_of_o_proj(
    scaled: bool, tmp_path: Path
) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    for layer, heads in ((0, (1, 3)), (2, (0,))):
        attention = f"model.layers.{layer}.self_attn"
        offset, scale = torch.zeros(4, 8), torch.zeros(4, 8)
        for head in heads:
            offset[head] = tensors[f"{attention}.attn_v.{head}"] = randn(8, std=1.0)
            if scaled:
                scale[head] = tensors[f"{attention}.attn_A.{head}"] = randn(8, std=1.0)
        forwards[f"{attention}.o_proj"] = lambda module, x, offset=offset, scale=scale: F.linear(
            (1 + scale.flatten()) * x + offset.flatten(), module.weight
        )
    reading = read_tensors({"peft_type": "LOFIT"}, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))


@pytest.mark.parametrize("axis", ["rank", "feature"])
@pytest.mark.parametrize("n_blocks", [2, 4])
@pytest.mark.parametrize("rslora", [False, True])
def test_block_lora_folds_on_both_axes(
    axis: str, n_blocks: int, rslora: bool, tmp_path: Path
) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    rank, alpha = 8, 12
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    for name in MODULES:
        n_in, n_out = shapes(name)
        if axis == "rank":
            a, arms = randn(rank // n_blocks, n_in), randn(n_blocks, n_out, rank // n_blocks)
            forwards[name] = lambda module, x, a=a, arms=arms: (
                F.linear(x, module.weight)
                + scale * sum(F.linear(F.linear(x, a), arm) for arm in arms)
            )
        else:
            a, arms = randn(rank, n_in // n_blocks), randn(n_out, rank)
            forwards[name] = lambda module, x, a=a, b=arms: (
                F.linear(x, module.weight)
                + scale * F.linear(sum(F.linear(part, a) for part in x.chunk(n_blocks, -1)), b)
            )
        tensors |= {
            f"{PREFIX}{name}.block_lora_A.weight": a,
            f"{PREFIX}{name}.block_lora_B.weight": arms,
        }
    config = lora_config(
        peft_type="BLOCK_LORA",
        r=rank,
        lora_alpha=alpha,
        n_blocks=n_blocks,
        block_axis=axis,
        use_rslora=rslora,
    )
    reading = read_tensors(config, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, forwards))
    expected = rank // n_blocks if axis == "rank" else rank
    assert {plan.rank for plan in reading.plan.modules.values()} == {expected}


def test_abmll_serves_its_mean_and_draws_plain_loras(tmp_path: Path) -> None:
    model, tensors, forwards = tiny_llama(), {}, {}
    for name in MODULES:
        n_in, n_out = shapes(name)
        a, b = randn(4, n_in), randn(n_out, 4)
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": a,
            f"{PREFIX}{name}.lora_B.weight": b,
            f"{PREFIX}{name}.lora_A.log_std": torch.full((4, n_in), -3.0),
            f"{PREFIX}{name}.lora_B.log_std": torch.full((n_out, 4), -3.0),
        }
        forwards[name] = additive(6 / 4, a, b)
    config = lora_config(peft_type="ABMLL")
    mean = read_tensors(config, tensors, model, tmp_path).plan
    check_logits(model, mean, patched_logits(model, forwards))
    plans = [
        read_tensors(drawn_config, drawn, model, tmp_path).plan
        for drawn_config, drawn in draws(config, tensors, n_draws=3, seed=1)
    ]
    assert len({plan.digest for plan in plans}) == 3
    spread = torch.stack([plan_logits(model, plan, PROMPT) for plan in plans]).std(dim=0)
    assert 0 < float(spread.max()) < 3
    again = next(iter(draws(config, tensors, n_draws=1, seed=1)))
    assert read_tensors(*again, model, tmp_path).plan.digest == plans[0].digest


def fine_tuned(rank: int | None, tied: bool, tmp_path: Path) -> tuple[nn.Module, Tensor, Path]:
    """A full fine-tune: linears move by rank ``rank`` (None = full), norms, head and rows too."""
    model = tiny_llama(tied=tied)
    tuned = untouched(model)
    with torch.no_grad():
        for name, module in tuned.named_modules():
            if isinstance(module, nn.Linear) and not (tied and name == "lm_head"):
                n_out, n_in = module.weight.shape
                delta = (
                    randn(n_out, n_in) if rank is None else randn(n_out, rank) @ randn(rank, n_in)
                )
                module.weight += delta
            elif "norm" in name:
                module.weight *= 1 + randn(*module.weight.shape)
        tuned.get_input_embeddings().weight[[4, 5, 60]] += randn(3, 32)
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT).logits
    tuned.save_pretrained(tmp_path)
    return model, expected, tmp_path / "model.safetensors"


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_fine_tune_of_low_rank_serves_exactly(tied: bool, tmp_path: Path) -> None:
    model, expected, file = fine_tuned(3, tied, tmp_path)
    reading = read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path)
    check_logits(model, reading.plan, expected)
    assert reading.report.kept_energy == pytest.approx(1.0, abs=1e-6)
    assert {plan.rank for plan in reading.plan.modules.values()} == {3}


def test_a_full_fine_tune_says_what_it_keeps_and_is_refused_below_the_limit(
    tmp_path: Path,
) -> None:
    model, expected, file = fine_tuned(None, False, tmp_path)
    loose = StoreLimits(max_delta_rank=24, min_delta_energy=0.5)
    reading = read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path, loose)
    energy = reading.report.kept_energy
    assert energy is not None
    assert 0.5 < energy < 1
    assert (plan_logits(model, reading.plan, PROMPT) - expected).abs().max() > 1e-3
    strict = StoreLimits(max_delta_rank=24, min_delta_energy=0.999)
    with pytest.raises(UnsupportedAdapter, match="keeps"):
        read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path, strict)


def test_a_full_fine_tune_with_enough_rank_is_exact(tmp_path: Path) -> None:
    model, expected, file = fine_tuned(None, False, tmp_path)
    reading = read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path)
    check_logits(model, reading.plan, expected)


def test_an_unknown_method_lists_the_readable_ones(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"NEWLORA is not known.*LORA"):
        read_tensors({"peft_type": "newlora"}, {"x": randn(2)}, tiny_llama(), tmp_path)
