"""Forms of adapters that ``tests/conformance`` has no row for, read and run by the plan executor.

The oracle is PEFT's own module, or the published formula; logits agree to 1e-4.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loraplex_adapter_store.errors import UnsupportedAdapter
from loraplex_adapter_store.families.from_base import full_delta
from loraplex_adapter_store.families.from_base.full_delta import truncate
from loraplex_adapter_store.families.low_rank.deltas import draws
from loraplex_adapter_store.limits import StoreLimits
from tests.support.adapters.plan_executor import plan_logits
from tests.support.adapters.round_trip import check_logits, check_round_trip, randomise, trained
from tests.support.bases.tiny_models import (
    PROMPT,
    read_path,
    read_tensors,
    tiny_gpt2,
    tiny_llama,
    untouched,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Iterator[None]:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# On a base with biases: what scales or rotates outputs must treat them as PEFT does.
CONFIGS: dict[str, peft.PeftConfig] = {
    "hra": peft.HRAConfig(r=4, target_modules=ALL),
    "hra odd rank": peft.HRAConfig(r=5, target_modules=SOME),
    "delora ranks": peft.DeloraConfig(r=5, target_modules=SOME, rank_pattern={"v_proj": 2}),
    "psoft series": peft.PsoftConfig(
        r=5, target_modules=SOME, use_cayley_neumann=True, cayley_neumann_eps=0.5,
        num_cayley_neumann_terms=4,
    ),
    "psoft free": peft.PsoftConfig(
        r=5, target_modules=SOME, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    ),
    "psoft pissa": peft.PsoftConfig(
        r=5, psoft_alpha=11, target_modules=SOME, ab_svd_init="pissa_init", psoft_mag_a=False
    ),
    "psoft drawn": peft.PsoftConfig(
        r=5, target_modules=ALL, psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=4
    ),
    "osf half": peft.OSFConfig(target_modules=SOME),
    "deft qr": peft.DeftConfig(r=4, decomposition_method="qr", target_modules=SOME),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=ALL),
    "lokr full": peft.LoKrConfig(r=40, alpha=20, target_modules=SOME, rank_pattern={"v_proj": 2}),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, target_modules=ALL),
    "oft constrained": peft.OFTConfig(
        oft_block_size=4, r=0, coft=True, eps=0.9, num_cayley_neumann_terms=3, target_modules=SOME
    ),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "boft count": peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=SOME),
    "road 1": peft.RoadConfig(variant="road_1", group_size=4, target_modules=ALL),
    "fourierft seed": peft.FourierFTConfig(
        n_frequency=60, scaling=90, random_loc_seed=5, n_frequency_pattern={"v_proj": 9},
        target_modules=SOME,
    ),
    "c3a pattern": peft.C3AConfig(
        block_size=16, block_size_pattern={"down_proj": 2}, target_modules=["q_proj", "down_proj"]
    ),
    "waveft db3": peft.WaveFTConfig(
        n_frequency=40, wavelet_family="db3", scaling=9, target_modules=ALL
    ),
    "waveft sym8": peft.WaveFTConfig(n_frequency=40, wavelet_family="sym8", target_modules=SOME),
    "waveft coif2": peft.WaveFTConfig(n_frequency=40, wavelet_family="coif2", target_modules=SOME),
    "waveft plain": peft.WaveFTConfig(
        n_frequency=40, use_idwt=False, random_loc_seed=3, target_modules=SOME
    ),
    "waveft proportional": peft.WaveFTConfig(
        n_frequency=40, proportional_parameters=True, target_modules=SOME
    ),
    "supertuning lora": peft.SupertuningConfig(
        sparsity=0.9, r=3, lora_alpha=5, select_top=False, target_modules=SOME
    ),
    "glora": peft.GloraConfig(r=3, target_modules=ALL),
    "glora vectors": peft.GloraConfig(
        config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=SOME
    ),
    "glora constants": peft.GloraConfig(
        config_A_B="constant", config_C="none", config_D_E="constant", target_modules=SOME
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_method_serves_as_it_was_trained(config: peft.PeftConfig, tmp_path: Path) -> None:
    reading = check_round_trip(tiny_llama(bias=True), config, tmp_path, std=0.3)
    assert reading.plan.family.value.upper() == config.peft_type.value


def test_places_of_the_largest_weights_are_found_again(tmp_path: Path) -> None:
    config = peft.SupertuningConfig(
        sparsity=0.9, save_precomputed_indices=False, target_modules=SOME
    )
    check_round_trip(tiny_llama(), config, tmp_path, std=0.3)


CONV1D: dict[str, peft.PeftConfig] = {
    "hira": peft.HiraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "fourierft": peft.FourierFTConfig(
        n_frequency=60, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "waveft": peft.WaveFTConfig(
        n_frequency=60, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "deft": peft.DeftConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "frod": peft.FrodConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "vblora": peft.VBLoRAConfig(
        r=3, num_vectors=12, vector_length=4, target_modules=["c_attn"], fan_in_fan_out=True
    ),
    "gralora": peft.GraloraConfig(
        r=4, gralora_k=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "ln tuning": peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]),
}


@pytest.mark.parametrize("config", CONV1D.values(), ids=CONV1D.keys())
def test_weights_stored_the_other_way_round_are_served_too(
    config: peft.PeftConfig, tmp_path: Path
) -> None:
    check_round_trip(tiny_gpt2(), config, tmp_path, std=0.3)


TIED: dict[str, dict[str, Any]] = {
    "adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted head, too": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied base", "untied base"])
@pytest.mark.parametrize("options", TIED.values(), ids=TIED.keys())
def test_ensured_weight_tying_changes_the_head_with_the_embedding(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=3, ensure_weight_tying=True, **options)
    check_round_trip(tiny_llama(tied=tied), config, tmp_path)


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_one_task_of_a_multitask_prompt_is_served(tmp_path: Path, n_tasks: int) -> None:
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=4, num_tasks=n_tasks, num_ranks=2, task_type="CAUSAL_LM"
    )
    model = tiny_llama()
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, std=0.9)
    tuned.eval()
    tuned.save_pretrained(tmp_path)
    if n_tasks > 1:
        with pytest.raises(UnsupportedAdapter, match="add it once for each"):
            read_path(tmp_path, model)
    for task in range(n_tasks):
        task_ids = torch.full((PROMPT.shape[0],), task)
        with torch.no_grad():
            expected = tuned(input_ids=PROMPT, task_ids=task_ids).logits[:, -PROMPT.shape[1] :]
        values = json.loads((tmp_path / "adapter_config.json").read_text())
        if n_tasks > 1:
            values["loraplex_task_id"] = task
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        check_logits(model, read_path(tmp_path, model).plan, expected)


def test_vera_and_randlora_hold_no_dense_delta(tmp_path: Path) -> None:
    model = tiny_llama()
    configs = (
        peft.VeraConfig(r=5, target_modules=ALL),
        peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=ALL),
    )
    for number, config in enumerate(configs):
        path = tmp_path / str(number)
        trained(model, config, path)
        plan = read_path(path, model).plan
        assert all(module.a is None and module.shared for module in plan.modules.values())
        found = [module.shared for module in plan.modules.values() if module.shared]
        pairs = {(basis.basis_digest, basis.a.shape, basis.b.shape) for basis in found}
        assert len(pairs) == len({digest for digest, _, _ in pairs}), "a digest names one pair"
        assert len({basis.a.untyped_storage().data_ptr() for basis in found}) == 1
        assert len({basis.b.untyped_storage().data_ptr() for basis in found}) <= 3


def test_draws_of_a_posterior_are_different_repeatable_loras(tmp_path: Path) -> None:
    model, tensors = tiny_llama(), {}
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    for name in names:
        n_out, n_in = model.get_submodule(name).weight.shape
        tensors |= {
            f"{name}.lora_A.weight": torch.randn(4, n_in) * 0.2,
            f"{name}.lora_B.weight": torch.randn(n_out, 4) * 0.2,
            f"{name}.lora_A.log_std": torch.full((4, n_in), -3.0),
            f"{name}.lora_B.log_std": torch.full((n_out, 4), -3.0),
        }
    config = {"peft_type": "ABMLL", "r": 4, "lora_alpha": 6, "target_modules": list(names)}
    plans = [
        read_tensors(drawn_config, drawn, model, tmp_path).plan
        for drawn_config, drawn in draws(config, tensors, n_draws=3, seed=1)
    ]
    assert len({plan.digest for plan in plans}) == 3
    spread = torch.stack([plan_logits(model, plan, PROMPT) for plan in plans]).std(dim=0)
    assert 0 < float(spread.max()) < 3
    again = next(iter(draws(config, tensors, n_draws=1, seed=1)))
    assert read_tensors(*again, model, tmp_path).plan.digest == plans[0].digest


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.2


def fine_tuned(rank: int | None, tmp_path: Path) -> tuple[nn.Module, Tensor, Path]:
    """A fine-tune with a head of its own: linears move by ``rank`` (None: full), all else too."""
    model = tiny_llama()
    tuned = untouched(model)
    with torch.no_grad():
        for name, module in tuned.named_modules():
            if isinstance(module, nn.Linear):
                n_out, n_in = module.weight.shape
                delta = (
                    _randn(n_out, n_in)
                    if rank is None
                    else _randn(n_out, rank) @ _randn(rank, n_in)
                )
                module.weight += delta
            elif "norm" in name:
                module.weight *= 1 + _randn(*module.weight.shape)
        tuned.get_input_embeddings().weight[[4, 5, 60]] += _randn(3, 32)
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT).logits
    tuned.save_pretrained(tmp_path)
    return model, expected, tmp_path / "model.safetensors"


def test_a_full_fine_tune_of_low_rank_serves_exactly(tmp_path: Path) -> None:
    model, expected, file = fine_tuned(3, tmp_path)
    reading = read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path)
    check_logits(model, reading.plan, expected)
    assert reading.report.kept_energy == pytest.approx(1.0, abs=1e-6)
    assert {plan.rank for plan in reading.plan.modules.values()} == {3}


def test_a_full_fine_tune_says_what_it_keeps_and_is_refused_below_the_limit(
    tmp_path: Path,
) -> None:
    model, expected, file = fine_tuned(None, tmp_path)
    loose = StoreLimits(max_delta_rank=24, min_delta_energy=0.5)
    reading = read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path, loose)
    energy = reading.report.kept_energy
    assert energy is not None
    assert 0.5 < energy < 1
    assert (plan_logits(model, reading.plan, PROMPT) - expected).abs().max() > 1e-3
    strict = StoreLimits(max_delta_rank=24, min_delta_energy=0.999)
    with pytest.raises(UnsupportedAdapter, match="keeps"):
        read_tensors({"peft_type": "FULL"}, load_file(file), model, tmp_path, strict)


def test_a_full_fine_tune_without_structure_is_refused_after_few_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight that is compressed costs the server time, and all would cost a minute."""
    compressed: list[tuple[int, ...]] = []

    def count(delta: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
        compressed.append(tuple(delta.shape))
        return truncate(delta, max_rank)

    model, _, file = fine_tuned(None, tmp_path)
    monkeypatch.setattr(full_delta, "truncate", count)
    with pytest.raises(UnsupportedAdapter, match="rank 4 keeps at most"):
        read_tensors(
            {"peft_type": "FULL"},
            load_file(file),
            model,
            tmp_path,
            StoreLimits(max_delta_rank=4),
        )
    n_linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert len(compressed) <= n_linears // 4


@pytest.mark.parametrize("shape", [(400, 600), (600, 400)])
def test_a_large_change_is_compressed_nearly_as_an_svd_does(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(3)
    u, _, v = torch.linalg.svd(torch.randn(*shape, generator=random), full_matrices=False)
    for decay in (0.75, 1.0, 1.5):
        sizes = torch.arange(1, 401.0) ** -decay
        delta = (u * sizes) @ v
        a, b, kept = truncate(delta, 16)
        best = float(sizes[:16].square().sum())
        assert best * 0.998 < kept <= best * (1 + 1e-6)
        assert (delta - b @ a).square().sum() == pytest.approx(
            float(sizes.square().sum()) - kept, rel=1e-3
        )
        assert all(map(torch.equal, truncate(delta, 16)[:2], (a, b)))
    exact = torch.randn(shape[0], 5, generator=random) @ torch.randn(5, shape[1], generator=random)
    a, b, _ = truncate(exact, 16)
    assert (a.shape[0], b.shape[1]) == (5, 5)
    torch.testing.assert_close(b @ a, exact, rtol=1e-4, atol=1e-4)
