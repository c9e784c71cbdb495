"""Recipes: each rule against an oracle, exact resumption, and files that serve what was trained."""

import json
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.variants import _kasa_layer_regularization_loss
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_training import config
from loraplex_training.config import ShapeError
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.families.table import new_adapter
from loraplex_training.recipes.ba_lora import penalty
from loraplex_training.recipes.lora_pro import adjusted
from loraplex_training.recipes.recipe import RecipeAdapter
from loraplex_training.recipes.table import RECIPES
from tests.support.adapters.plan_executor import plan_logits
from tests.support.bases.tiny_models import read_path, tiny_llama, untouched

SHAPE = LoraShape(4, 6.0, ("q_proj", "up_proj", "down_proj"))
Q = "model.layers.1.self_attn.q_proj"


def _engine() -> TrainingEngine:
    model = tiny_llama()
    return TrainingEngine(FrozenModel(model.config, ModelWeights(model), dtype=torch.float32))


def _data(n: int = 3) -> list[Datum]:
    random = torch.Generator().manual_seed(4)
    data = []
    for _ in range(n):
        tokens = torch.randint(3, 60, (13,), generator=random)
        weights = torch.zeros(12)
        weights[6:] = 1 / (6 * n)
        data.append(Datum(tokens[:-1], tokens[1:], weights))
    return data


def _steps(engine: TrainingEngine, adapter: LearningAdapter, n: int, lr: float = 3e-3) -> float:
    loss = 0.0
    for _ in range(n):
        loss = engine.forward_backward([Work(adapter, _data())])[0].loss
        engine.step(adapter, Adam(lr))
    return loss


def _recipe(engine: TrainingEngine, name: str) -> RecipeAdapter:
    shape = config.AdapterShape(recipe=name, rank=4, alpha=6.0, targets=SHAPE.targets)
    adapter = new_adapter(engine, shape, 5, _data())
    assert isinstance(adapter, RecipeAdapter)
    return adapter


def _base_gradients(data: Sequence[Datum]) -> dict[str, Tensor]:
    """Return autograd's gradients of the weights of transformers' own model."""
    model = tiny_llama()
    for datum in data:
        logits = model(input_ids=datum.tokens[None]).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, datum.targets[:, None])[:, 0]
        (-(logprobs * datum.weights).sum()).backward()
    return {
        n.removesuffix(".weight"): p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_lowers_the_loss_and_the_file_serves_what_was_trained(
    name: str, tmp_path: Path
) -> None:
    engine, model = _engine(), tiny_llama()
    adapter = _recipe(engine, name)
    before = engine.forward_backward([Work(adapter, _data())], backward=False)[0].loss
    _steps(engine, adapter, 45 if name == "flexora" else 20, lr=2e-2)  # Flexora searches first
    if adapter.recipe.served is not None:  # the noise of training is not served
        _without_noise(adapter)
    (outcome,) = engine.forward_backward([Work(adapter, _data())], backward=False)
    assert outcome.loss < before - 0.05
    adapter.save(tmp_path, "tiny")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert saved["r"] <= config.RECIPES[name] * SHAPE.rank
    plan = read_path(tmp_path, model).plan
    datum = _data()[0]
    with torch.inference_mode():
        served = plan_logits(model, plan, datum.tokens[None])[0].log_softmax(-1)
    expected = served.gather(1, datum.targets[:, None])[:, 0] * (datum.weights != 0)
    assert (outcome.logprobs[0] - expected).abs().max() < 1e-4
    tuned = peft.PeftModel.from_pretrained(untouched(model), tmp_path)  # PEFT reads the same
    with torch.inference_mode():
        theirs = tuned(input_ids=datum.tokens[None]).logits[0].log_softmax(-1)
    assert (theirs - served).abs().max() < 1e-4


def _without_noise(adapter: RecipeAdapter) -> None:
    for part in adapter.parts.values():
        for leaf in ("noise_a", "noise_b"):
            part.frozen[leaf].zero_()
    adapter.refresh()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_saved_state_goes_on_to_the_same_bits(name: str) -> None:
    engine = _engine()
    whole, first = _recipe(engine, name), _recipe(engine, name)
    _steps(engine, whole, 6)
    _steps(engine, first, 3)
    second = _recipe(engine, name)
    second.load_state({k: v.clone() for k, v in first.state().items()})
    _steps(engine, second, 3)
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[key]), key


def test_the_names_are_those_of_the_options() -> None:
    assert RECIPES.keys() == config.RECIPES.keys()


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ShapeError, match=r"'lora-xl'; choose lora, allora, ba-lora"):
        config.AdapterShape(recipe="lora-xl")


def test_gradients_of_the_base_are_autograds() -> None:
    adapter = _recipe(_engine(), "lora-sb")
    expected = _base_gradients(_data())
    for name, part in adapter.parts.items():
        u, sigma, vh = torch.linalg.svd(-3e-6 * expected[name].sign(), full_matrices=False)
        first_step = u[:, :4] * sigma[:4] @ vh[:4]
        own = SHAPE.scale * part["B"] @ part["R"] @ part["A"]
        assert torch.allclose(own, first_step, atol=1e-3 * float(first_step.abs().max())), name


@pytest.mark.filterwarnings("ignore")
def test_lora_ga_starts_in_the_directions_of_peft() -> None:
    model = tiny_llama()
    options = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        target_modules=list(SHAPE.targets),
    )

    def step() -> None:
        for datum in _data():
            logits = model(input_ids=datum.tokens[None]).logits[0]
            logprobs = logits.log_softmax(-1).gather(1, datum.targets[:, None])[:, 0]
            (-(logprobs * datum.weights).sum()).backward()

    preprocess_loraga(model, options, step)
    theirs = peft.get_peft_model(model, options)
    engine = _engine()
    adapter = _recipe(engine, "lora-ga")
    for name, part in adapter.parts.items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        for own, their in ((part["A"], a), (part["B"].t(), b.t())):
            cosines = torch.cosine_similarity(own, their, dim=1).abs()
            assert cosines.min() > 0.999, name
    plain = engine.new_adapter(SHAPE, 0)  # neither changes the base at the start
    losses = [engine.forward_backward([Work(x, _data())])[0].loss for x in (adapter, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_lora_pros_step_is_the_nearest_to_that_of_full_fine_tuning() -> None:
    """The least-squares solution over all steps of both factors, without any closed form."""
    torch.manual_seed(1)
    a, b, g = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5), (6, 2), (6, 5)))
    s = 1.5
    ga, gb = adjusted(a, b, s * b.t() @ g, s * g @ a.t(), s)
    step = s * (b @ ga + gb @ a)
    columns = [
        s * torch.kron(b, torch.eye(5).double()),
        s * torch.kron(torch.eye(6).double(), a.t().contiguous()),
    ]
    system = torch.cat(columns, dim=1)
    best = system @ torch.linalg.lstsq(system, g.flatten(), driver="gelsd").solution
    assert torch.allclose(step.flatten(), best, atol=1e-9)
    zero_a, zero_b = adjusted(a, torch.zeros_like(b), torch.zeros_like(a), s * g @ a.t(), s)
    assert not zero_a.any()
    assert torch.allclose(s * zero_b @ a, g @ torch.linalg.pinv(a) @ a)


@pytest.mark.filterwarnings("ignore")
def test_kasa_starts_on_the_truncated_base_as_peft_does() -> None:
    engine, model = _engine(), tiny_llama()
    theirs = _peft_kasa(model)
    plain = engine.new_adapter(SHAPE, 0)  # starts as the base
    adapters = _recipe(engine, "kasa"), plain
    own, base = (
        engine.forward_backward([Work(adapter, _data())], backward=False)[0].logprobs
        for adapter in adapters
    )
    for datum, logprobs, of_base in zip(_data(), own, base, strict=True):
        with torch.inference_mode():
            logits = theirs(input_ids=datum.tokens[None]).logits[0].log_softmax(-1)
        expected = logits.gather(1, datum.targets[:, None])[:, 0] * (datum.weights != 0)
        assert (logprobs - expected).abs().max() < 1e-4
        assert (logprobs - of_base).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_kasas_gradients_are_those_of_peft() -> None:
    engine, model = _engine(), tiny_llama()
    adapter = _recipe(engine, "kasa")
    theirs = _peft_kasa(model)
    torch.manual_seed(2)
    for name, part in adapter.parts.items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        part["B"].data.normal_(0, 0.1)
        module.lora_A["default"].weight.data.copy_(part["A"])
        module.lora_B["default"].weight.data.copy_(part["B"])
        module.lora_diag["default"].data.copy_(part["diag"])
    adapter.refresh()
    engine.forward_backward([Work(adapter, _data())])
    adapter.pull_back()
    adapter.recipe.gradient(adapter)
    theirs.train()
    for datum in _data():
        logits = theirs(input_ids=datum.tokens[None]).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, datum.targets[:, None])[:, 0]
        (-(logprobs * datum.weights).sum()).backward()
    _kasa_penalty(theirs)
    for name, part in adapter.parts.items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        for own, their in (
            (part["A"], module.lora_A["default"].weight),
            (part["B"], module.lora_B["default"].weight),
            (part["diag"], module.lora_diag["default"]),
        ):
            assert torch.allclose(own.grad, their.grad, rtol=1e-3, atol=1e-6), name


def _peft_kasa(model: PreTrainedModel) -> peft.PeftModel:
    options = peft.LoraConfig(
        r=4, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=list(SHAPE.targets)
    )
    return peft.get_peft_model(untouched(model), options)


def _kasa_penalty(model: peft.PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "lora_diag") and len(module.lora_diag):
            _kasa_layer_regularization_loss(module, "default", 1e-4, 1e-3).backward()


def test_comp_loras_update_leaves_the_principal_directions_alone() -> None:
    engine, model = _engine(), tiny_llama()
    adapter = _recipe(engine, "comp-lora")
    _steps(engine, adapter, 5)
    for name, (a, b) in adapter.factors.items():
        vh = torch.linalg.svd(model.get_submodule(name).weight)[2][:4]
        assert (b @ a @ vh.t()).abs().max() < 1e-6
        assert b.any()


def test_sora_saves_open_ranks_alone(tmp_path: Path) -> None:
    engine = _engine()
    adapter = _recipe(engine, "sora")
    for i, part in enumerate(adapter.parts.values()):
        part["gate"].data[: i % 4] = 0.01
        if i == 4:
            part["gate"].data.fill_(0.01)
    _steps(engine, adapter, 4, lr=1e-2)
    adapter.save(tmp_path, "tiny")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(saved["target_modules"]) == len(adapter.parts) - 1
    assert saved["rank_pattern"]
    ranks = {n: p.rank for n, p in read_path(tmp_path, tiny_llama()).plan.modules.items()}
    for name, part in adapter.parts.items():
        assert ranks.get(name, 0) == int((part["gate"] != 0).sum())


def test_alloras_step_of_a_row_falls_with_its_length() -> None:
    engine = _engine()
    adapter, plain = _recipe(engine, "allora"), _recipe(engine, "allora")
    for each in (adapter, plain):
        each.parts[Q]["B"].data[0] = 3.0
        each.refresh()
        engine.forward_backward([Work(each, _data())])
    before = adapter.parts[Q]["B"].detach().clone()
    adapter.step(Adam(1e-3))
    plain.pull_back()
    plain.adam_step(Adam(1e-3))
    steps = adapter.parts[Q]["B"].detach() - before, plain.parts[Q]["B"].detach() - before
    share = steps[0].norm(dim=1) / steps[1].norm(dim=1)
    assert share[0] == pytest.approx((6 + 0.01) ** -0.5, rel=1e-2)  # ‖3, 3, 3, 3‖ = 6
    assert share[1] == pytest.approx(10, rel=1e-2)
    assert adapter.shape.scale == 1


def test_glads_gradient_is_that_of_the_penalised_norm() -> None:
    """g = (1 − α) ∇L(θ) + α ∇L(θ + ρ ĝ), with PEFT's model as L."""
    engine = _engine()
    adapter = _recipe(engine, "glad")
    torch.manual_seed(3)
    for part in adapter.parts.values():
        part["B"].data.normal_(0, 0.1)
    adapter.refresh()
    start = {n: p.detach().clone() for n, p in adapter.parameters.items()}

    def gradient(values: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = engine.new_adapter(SHAPE, 0)
        for name, (a, b) in plain.factors.items():
            a.data.copy_(values[f"{name}.A"])
            b.data.copy_(values[f"{name}.B"])
        engine.forward_backward([Work(plain, _data())])
        grads = {}
        for name, (a, b) in plain.factors.items():
            grads |= {f"{name}.A": a.grad, f"{name}.B": b.grad}
        return grads

    here = gradient(start)
    norm = torch.cat([g.flatten() for g in here.values()]).norm()
    there = gradient({n: v + 0.05 * here[n] / norm for n, v in start.items()})
    engine.forward_backward([Work(adapter, _data())])
    adapter.pull_back()
    adapter.recipe.gradient(adapter)
    for name, parameter in adapter.parameters.items():
        assert torch.equal(parameter, start[name])
        expected = 0.5 * here[name] + 0.5 * there[name]
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-7), name


def test_ba_loras_penalty_reaches_the_gradient() -> None:
    engine = _engine()
    adapter, bare = _recipe(engine, "ba-lora"), _recipe(engine, "ba-lora")
    adapter.penalty = lambda own, base: 1e5 * penalty(own, base)
    bare.penalty = None
    for each in (adapter, bare):
        for part in each.parts.values():
            part["B"].data.mul_(1.2)
        each.refresh()
        engine.forward_backward([Work(each, _data())])
        each.pull_back()
    model = tiny_llama()
    options = peft.LoraConfig(r=8, lora_alpha=12, target_modules=list(SHAPE.targets))
    tuned = peft.get_peft_model(untouched(model), options)
    peft.set_peft_model_state_dict(tuned, adapter.tensors())
    own, base = [], []
    for datum in _data():
        at = datum.weights != 0
        own.append(tuned(input_ids=datum.tokens[None]).logits[0][at])
        with torch.no_grad():
            base.append(model(input_ids=datum.tokens[None]).logits[0][at])
    (1e5 * penalty(torch.cat(own), torch.cat(base))).backward()
    module = tuned.get_submodule(f"base_model.model.{Q}")
    expected = module.lora_B["default"].weight.grad[:, :4]
    difference = adapter.parts[Q]["B"].grad - bare.parts[Q]["B"].grad
    assert expected.abs().max() > 1e-2
    assert torch.allclose(difference, expected, rtol=1e-2, atol=1e-4)


def test_flexora_keeps_the_layers_with_the_larger_weights() -> None:
    engine = _engine()
    adapter = _recipe(engine, "flexora")
    _steps(engine, adapter, 39, lr=2e-2)
    gates = {part["gate"].item() for part in adapter.parts.values()}
    assert len(gates) == 3
    assert sum(gates) == pytest.approx(3, abs=1e-4)
    _steps(engine, adapter, 3)
    chosen = {name for name, part in adapter.parts.items() if part["gate"].item() == 1}
    assert 0 < len(chosen) < len(adapter.parts)
    assert {
        n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in adapter.tensors()
    } == chosen


def test_ggpos_noise_follows_the_norms_and_is_not_saved() -> None:
    engine = _engine()
    adapter = _recipe(engine, "ggpo")
    _steps(engine, adapter, 2)
    part = adapter.parts[Q]
    assert part["noise_b"].any()
    assert adapter.shape.rank == 8
    assert adapter.tensors()[f"base_model.model.{Q}.lora_A.weight"].shape[0] == 4
