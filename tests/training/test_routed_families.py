"""MixLoRA and Block-LoRA in training: what is learnt, saved and read back is one function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan, Family
from loraplex_training.attached import Attached
from loraplex_training.block_lora import BlockLora
from loraplex_training.config import AdapterShape, BlockShape, ExpertShape
from loraplex_training.families import family_of
from loraplex_training.mixlora import DEFAULT_COEFFICIENT, BalanceLoss, MixLora, balance_loss
from tests.support.adapters.plan_executor import plan_logits
from tests.support.bases.tiny_models import PROMPT, read_path, tiny_llama, untouched


def _mixlora(experts: ExpertShape, **shape: Any) -> Attached:
    settings = AdapterShape(family="mixlora", experts=experts, **shape)
    return Attached(untouched(tiny_llama()), lambda model: MixLora(model, settings))


def _block_lora(blocks: BlockShape, **shape: Any) -> Attached:
    settings = AdapterShape(family="block-lora", blocks=blocks, **shape)
    return Attached(untouched(tiny_llama()), lambda model: BlockLora(model, settings))


def _train_a_little(attached: Attached, n_steps: int = 6) -> None:
    attached.train()
    trained = [p for p in attached.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    mask = torch.ones_like(PROMPT)
    for _ in range(n_steps):
        logits = attached(input_ids=PROMPT, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), PROMPT[:, 1:].flatten()
        )
        (loss + attached.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    attached.eval()


def _saved_plan(attached: Attached, folder: Path) -> AdapterPlan:
    family_of("mixlora").save(attached, AdapterShape(stored_dtype="float32"), "tiny", folder)
    return read_path(folder, tiny_llama()).plan


def _logits(attached: Attached) -> Tensor:
    with torch.inference_mode():
        return attached(input_ids=PROMPT).logits


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_trained_mixlora_reads_back_as_the_function_that_was_trained(
    top_k: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    attached = _mixlora(ExpertShape(3, top_k), rank=3, alpha=6.0, dropout=0.1)
    _train_a_little(attached)
    plan = _saved_plan(attached, tmp_path)
    assert plan.family is Family.MIXLORA
    assert all(len(block.experts) == 3 for block in plan.experts.values())
    want = plan_logits(tiny_llama(), plan, PROMPT)
    got = _logits(attached)
    assert float((got - want).abs().max()) <= 1e-4
    with torch.inference_mode():
        assert float((got - tiny_llama()(input_ids=PROMPT).logits).abs().max()) > 0.1


@pytest.mark.parametrize("axis", ["rank", "feature"])
def test_a_trained_block_lora_reads_back_as_the_function_that_was_trained(
    axis: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    attached = _block_lora(BlockShape(2, axis), rank=4, alpha=8.0, dropout=0.1)
    _train_a_little(attached)
    plan = _saved_plan(attached, tmp_path)
    assert plan.family is Family.BLOCK_LORA
    want = plan_logits(tiny_llama(), plan, PROMPT)
    assert float((_logits(attached) - want).abs().max()) <= 1e-4
    ranks = {module.rank for module in plan.modules.values()}
    assert ranks == {2 if axis == "rank" else 4}


def test_an_untrained_adapter_is_the_base() -> None:
    with torch.inference_mode():
        want = tiny_llama()(input_ids=PROMPT).logits
    for attached in (
        _mixlora(ExpertShape(4)),
        _block_lora(BlockShape()),
        _block_lora(BlockShape(axis="feature")),
    ):
        torch.testing.assert_close(_logits(attached.eval()), want, atol=1e-5, rtol=0)


def test_evaluation_switches_every_dropout_off_experts_included() -> None:
    torch.manual_seed(2)
    attached = _mixlora(ExpertShape(4), dropout=0.5)
    _train_a_little(attached, 2)
    assert torch.equal(_logits(attached), _logits(attached))
    attached.train()
    assert not torch.equal(_logits(attached), _logits(attached))


def test_exactly_the_adapter_is_trained() -> None:
    attached = _mixlora(ExpertShape(2))
    trained = [p for p in attached.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(
        t.numel() for t in attached.adapter.tensors().values()
    )


def test_tensors_load_into_an_adapter_of_the_same_shape_only() -> None:
    first = _mixlora(ExpertShape(2), rank=2)
    _train_a_little(first, 2)
    second = _mixlora(ExpertShape(2), rank=2)
    second.adapter.load(first.adapter.tensors())
    torch.testing.assert_close(_logits(second.eval()), _logits(first))
    with pytest.raises(ValueError, match="tensors differ"):
        _mixlora(ExpertShape(3), rank=2).adapter.load(first.adapter.tensors())


def test_the_config_carries_the_published_fields(tmp_path: Path) -> None:
    attached = _mixlora(ExpertShape(2, balance="argmax"))
    family_of("mixlora").save(attached, AdapterShape(), "some/base", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MIXLORA"
    assert config["routing_strategy"] == "mixlora"
    assert (config["num_experts"], config["top_k"]) == (2, 2)
    assert config["router_aux_loss_coef"] == 0.01
    assert config["base_model_name_or_path"] == "some/base"


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="n_blocks is 3, must divide 4"):
        _block_lora(BlockShape(3), rank=4)


def test_balanced_gates_cost_k_pooled_and_one_by_argmax() -> None:
    """Every expert is first once and second once; probabilities average out evenly."""
    logits = torch.eye(4) * 2 + torch.eye(4).roll(1, dims=1)
    layers = [logits, logits.flip(0)]
    assert float(balance_loss(layers, BalanceLoss.POOLED, top_k=2)) == pytest.approx(2.0)
    assert float(balance_loss(layers, BalanceLoss.ARGMAX, top_k=2)) == pytest.approx(1.0)
    assert float(balance_loss(layers, BalanceLoss.NONE, top_k=2)) == 0.0


def test_pooling_forgives_layers_that_are_skewed_in_opposite_ways_and_the_paper_does_not() -> None:
    left, right = torch.tensor([[4.0, 0.0]] * 6), torch.tensor([[0.0, 4.0]] * 6)
    pooled = balance_loss([left, right], BalanceLoss.POOLED, top_k=1)
    per_layer = balance_loss([left, right], BalanceLoss.ARGMAX, top_k=1)
    assert float(pooled) == pytest.approx(1.0)
    assert float(per_layer) > 1.9


def test_padding_does_not_count_as_load() -> None:
    real = torch.randn(5, 4)
    padded = torch.cat([real, torch.full((7, 4), 9.0) * torch.eye(4)[0]])
    mask = torch.tensor([True] * 5 + [False] * 7)
    for kind in (BalanceLoss.POOLED, BalanceLoss.ARGMAX):
        got = balance_loss([padded], kind, top_k=2, token_mask=mask)
        torch.testing.assert_close(got, balance_loss([real], kind, top_k=2))


def test_the_pooled_loss_is_that_of_mixtral_in_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(torch.randn(11, 6) for _ in range(3))
    want = load_balancing_loss_func(logits, num_experts=6, top_k=2)
    torch.testing.assert_close(balance_loss(logits, BalanceLoss.POOLED, top_k=2), want)


def test_the_usual_coefficients_are_those_of_code_and_paper() -> None:
    assert DEFAULT_COEFFICIENT[BalanceLoss.POOLED] == 1e-3
    assert DEFAULT_COEFFICIENT[BalanceLoss.ARGMAX] == 1e-2
