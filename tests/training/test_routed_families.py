"""MixLoRA and Block-LoRA in training: what is learnt, saved and read back is one function."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from loraplex_adapter_store.plan import AdapterPlan, Family
from loraplex_training.config import AdapterShape, BlockShape, ExpertShape, ShapeError
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.errors import TrainingError
from loraplex_training.families.mixlora import DEFAULT_COEFFICIENT, BalanceLoss, balance_loss
from loraplex_training.families.table import new_adapter
from tests.support.adapters.mixlora_module import MixLoraModule
from tests.support.adapters.plan_executor import plan_logits
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_models import PROMPT, read_path, tiny_llama, untouched

MIXLORA = AdapterShape("mixlora", rank=3, alpha=6.0, experts=ExpertShape(4, 2))


def _engine(model: PreTrainedModel | None = None, **options: bool) -> TrainingEngine:
    model = tiny_llama() if model is None else model
    weights = ModelWeights(model)
    return TrainingEngine(FrozenModel(model.config, weights, dtype=torch.float32, **options))


def _datum(tokens: Tensor = PROMPT[0]) -> Datum:
    weights = torch.ones(len(tokens) - 1) / (len(tokens) - 1)
    return Datum(tokens[:-1], tokens[1:], weights)


def _block_lora(axis: str) -> AdapterShape:
    return AdapterShape("block-lora", rank=4, alpha=8.0, blocks=BlockShape(2, axis))


def _train_a_little(engine: TrainingEngine, adapter: LearningAdapter, n_steps: int = 6) -> None:
    for _ in range(n_steps):
        engine.forward_backward([Work(adapter, [_datum()])])
        engine.step(adapter, Adam(0.05))


def _saved_plan(adapter: LearningAdapter, folder: Path) -> AdapterPlan:
    adapter.save(folder, "tiny")
    return read_path(folder, tiny_llama()).plan


def _logprobs(engine: TrainingEngine, adapter: LearningAdapter) -> Tensor:
    return engine.forward_backward([Work(adapter, [_datum()])], backward=False)[0].logprobs[0]


def _of_plan(plan: AdapterPlan) -> Tensor:
    logprobs = plan_logits(tiny_llama(), plan, PROMPT[:, :-1])[0].log_softmax(-1)
    return logprobs.gather(1, PROMPT[0, 1:, None])[:, 0]


@pytest.mark.parametrize("balance", ["pooled", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixloras_gradients_are_those_of_the_formula_beside_other_adapters(
    balance: str, checkpointing: bool
) -> None:
    engine = _engine(gradient_checkpointing=checkpointing)
    shape = AdapterShape(
        "mixlora", rank=3, alpha=6.0, experts=ExpertShape(4, 2, balance, balance_coefficient=0.5)
    )
    adapter = new_adapter(engine, shape, 0, [])
    random = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters.values():
        parameter.data.normal_(0, 0.2, generator=random)
    plain = engine.new_adapter(LoraShape(4, 8.0), 1)
    other = _datum(torch.arange(5, 20))
    works = [Work(plain, [other]), Work(adapter, [_datum()]), Work(plain, [other])]
    outcome = engine.forward_backward(works)[1]
    assert engine.n_shared == 1

    model = untouched(tiny_llama()).requires_grad_(False)
    module = MixLoraModule(model, adapter.tensors(), scale=2.0, top_k=2)
    logits = model(input_ids=PROMPT[:, :-1]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, PROMPT[0, 1:])
    assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    if balance == "pooled":
        loss = loss + 0.5 * load_balancing_loss_func(tuple(module.logits), 4, 2)
    loss.backward()
    for stacked, parameter in adapter.parameters.items():
        projection, _, leaf = stacked.rpartition(".experts.")
        names = [f"{projection}.experts.{e}.{leaf}" for e in range(4)] if projection else [stacked]
        expected = torch.stack([module.leaves[name].grad for name in names])
        gradient = parameter.grad if projection else parameter.grad[None]
        distance = float((gradient - expected).norm() / expected.norm().clamp_min(1e-6))
        assert distance < 1e-4, stacked


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_trained_mixlora_reads_back_as_the_function_that_was_trained(
    top_k: int, tmp_path: Path
) -> None:
    engine = _engine()
    shape = AdapterShape("mixlora", rank=3, alpha=6.0, dropout=0.1, experts=ExpertShape(3, top_k))
    adapter = new_adapter(engine, shape, 0, [])
    _train_a_little(engine, adapter)
    plan = _saved_plan(adapter, tmp_path)
    assert plan.family is Family.MIXLORA
    assert all(len(block.experts) == 3 for block in plan.experts.values())
    got = _logprobs(engine, adapter)
    assert float((got - _of_plan(plan)).abs().max()) <= 1e-4
    base = LearningAdapter(adapter.shape, {})
    assert float((got - _logprobs(engine, base)).abs().max()) > 0.1


@pytest.mark.parametrize("axis", ["rank", "feature"])
def test_a_trained_block_lora_reads_back_as_the_function_that_was_trained(
    axis: str, tmp_path: Path
) -> None:
    engine = _engine()
    adapter = new_adapter(engine, _block_lora(axis), 0, [])
    _train_a_little(engine, adapter)
    plan = _saved_plan(adapter, tmp_path)
    assert plan.family is Family.BLOCK_LORA
    assert float((_logprobs(engine, adapter) - _of_plan(plan)).abs().max()) <= 1e-4
    ranks = {module.rank for module in plan.modules.values()}
    assert ranks == {2 if axis == "rank" else 4}


@pytest.mark.parametrize("shape", [MIXLORA, _block_lora("rank"), _block_lora("feature")])
def test_an_untrained_adapter_is_the_base_and_an_equal_start_goes_on(shape: AdapterShape) -> None:
    engine = _engine()
    adapter = new_adapter(engine, shape, 0, [])
    base = LearningAdapter(adapter.shape, {})
    want = _logprobs(engine, base)
    torch.testing.assert_close(_logprobs(engine, adapter), want, atol=1e-5, rtol=0)
    _train_a_little(engine, adapter, 2)
    later = new_adapter(engine, shape, 1, [])
    later.start_from(adapter.tensors())
    torch.testing.assert_close(_logprobs(engine, later), _logprobs(engine, adapter))
    with pytest.raises(TrainingError, match="another shape"):
        engine.new_adapter(LoraShape(3, 6.0), 0).start_from(adapter.tensors())


@pytest.mark.parametrize("family", ["dora", "mixlora", "block-lora"])
def test_a_saved_state_goes_on_to_the_same_bits(family: str) -> None:
    engine = _engine()
    shape = AdapterShape(family, rank=4, alpha=8.0)
    whole, first, second = (new_adapter(engine, shape, 0, []) for _ in range(3))
    _train_a_little(engine, whole, 4)
    _train_a_little(engine, first, 2)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    _train_a_little(engine, second, 2)
    assert all(torch.equal(t, second.state()[n]) for n, t in whole.state().items())


def test_the_config_has_the_published_fields_and_the_bases_activation(tmp_path: Path) -> None:
    shape = AdapterShape("mixlora", experts=ExpertShape(2, balance="argmax"))
    adapter = new_adapter(_engine(tiny_model("gemma")), shape, 0, [])
    adapter.save(tmp_path, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MIXLORA"
    assert config["routing_strategy"] == "mixlora"
    assert (config["num_experts"], config["top_k"]) == (2, 2)
    assert config["router_aux_loss_coef"] == 0.01
    assert config["base_model_name_or_path"] == "some/base"
    assert config["act_fn"] == tiny_model("gemma").config.hidden_act


def test_what_does_not_fit_is_refused_and_named() -> None:
    shape = AdapterShape("block-lora", rank=4, blocks=BlockShape(3))
    with pytest.raises(TrainingError, match="n_blocks is 3, must divide 4"):
        new_adapter(_engine(), shape, 0, [])
    with pytest.raises(TrainingError, match="gate_proj, up_proj and down_proj"):
        new_adapter(_engine(tiny_model("phi3")), MIXLORA, 0, [])
    for field, options in (
        ("family", {"family": "magic"}),
        ("experts", {"experts": ExpertShape()}),
        ("blocks", {"family": "mixlora", "blocks": BlockShape()}),
        ("dropout", {"family": "dora", "dropout": 0.1}),
        ("targets", {"family": "mixlora", "targets": ("q_proj",)}),
    ):
        with pytest.raises(ShapeError) as refused:
            AdapterShape(**options)  # type: ignore[arg-type]
        assert refused.value.field == field


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


def test_the_usual_coefficients_are_those_of_code_and_paper() -> None:
    assert DEFAULT_COEFFICIENT[BalanceLoss.POOLED] == 1e-3
    assert DEFAULT_COEFFICIENT[BalanceLoss.ARGMAX] == 1e-2
