"""The training engine: gradients are those of PEFT, whatever trains beside an adapter."""

from collections.abc import Sequence
from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor

from loraplex_training.config import AdapterShape
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.engine.segmented_lora import Dropout
from loraplex_training.errors import TrainingError
from loraplex_training.families.dora import Dora
from loraplex_training.families.table import new_adapter
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_models import untouched

FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "granite"]


def _engine(model: object) -> TrainingEngine:
    weights = ModelWeights(model)  # type: ignore[arg-type]
    return TrainingEngine(FrozenModel(model.config, weights, dtype=torch.float32))  # type: ignore[attr-defined]


def _datum(seed: int, n: int, head: int = 0) -> Datum:
    """Return ``n`` random tokens of which the last third are answers, after a common head."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randint(3, 60, (head,), generator=torch.Generator().manual_seed(99))
    own = torch.randint(3, 60, (n - head + 1,), generator=random)
    tokens = torch.cat([common, own])
    weights = torch.zeros(n)
    weights[max(2 * n // 3, head + 1) :] = 1 + torch.rand(n, generator=random)[0]
    return Datum(tokens[:-1], tokens[1:], weights)


def _with_values(adapter: LearningAdapter, seed: int) -> LearningAdapter:
    random = torch.Generator().manual_seed(seed)
    for _, b in adapter.factors.values():
        b.data.normal_(0, 0.05, generator=random)
    return adapter


def _of_peft(
    model: torch.nn.Module,
    adapter: LearningAdapter,
    data: Sequence[Datum],
    dropout: Dropout | None = None,
) -> dict[str, Tensor]:
    """Return the gradients that PEFT computes in float64, a sequence at a time."""
    shape = adapter.shape
    targets = "all-linear" if shape.targets == ("all-linear",) else list(shape.targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        use_rslora=shape.rslora,
        fan_in_fan_out=model.config.model_type == "gpt2",
        target_modules=targets,
        layers_to_transform=None if shape.layers is None else list(shape.layers),
        use_dora=isinstance(adapter, Dora),
        lora_dropout=shape.dropout,
    )
    tuned = peft.get_peft_model(untouched(model), config)  # type: ignore[arg-type]
    peft.set_peft_model_state_dict(tuned, adapter.tensors())
    tuned = tuned.double().eval()
    for name in adapter.factors if dropout else ():
        module = tuned.get_submodule(f"base_model.model.{name}")
        module.lora_dropout["default"] = _Masked(name, dropout)
    for datum in data:
        logits = tuned(input_ids=datum.tokens[None]).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, datum.targets[:, None])[:, 0]
        (-(logprobs * datum.weights).sum()).backward()
    return {
        name.replace(".default", "").replace("vector.weight", "vector"): parameter.grad
        for name, parameter in tuned.named_parameters()
        if parameter.grad is not None
    }


class _Masked(torch.nn.Module):
    """Dropout whose masks are given."""

    def __init__(self, name: str, dropout: Dropout) -> None:
        super().__init__()
        self._name, self._dropout = name, dropout

    def forward(self, x: Tensor) -> Tensor:
        return x * self._dropout.mask(self._name, x[0].float())


def _distance(adapter: LearningAdapter, expected: dict[str, Tensor]) -> float:
    """Return the distance of all gradients, relative to the expected ones."""
    assert expected.keys() == adapter.parameters.keys()
    apart = whole = 0.0
    for name, gradient in expected.items():
        own = adapter.parameters[name].grad
        assert own is not None
        apart += float((own.double() - gradient).square().sum())
        whole += float(gradient.square().sum())
    return float((apart / whole) ** 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_mixed_batch_are_those_of_peft(family: str) -> None:
    model = tiny_model(family)
    engine = _engine(model)
    name = "c_attn" if family == "gpt2" else "o_proj"
    adapters = [
        _with_values(engine.new_adapter(shape, i), i)
        for i, shape in enumerate(
            [LoraShape(4, 8.0), LoraShape(2, 6.0, (name,)), LoraShape(8, 8.0, rslora=True)]
        )
    ]
    data = [
        [_datum(1, 30, 12), _datum(2, 21, 12), _datum(3, 40, 12)],  # share a head
        [_datum(4, 9)],
        [_datum(5, 33), _datum(6, 7)],
    ]
    works = [Work(adapter, each) for adapter, each in zip(adapters, data, strict=True)]
    outcomes = engine.forward_backward(works)
    assert engine.n_forwards == engine.n_shared == 1
    for adapter, each, outcome in zip(adapters, data, outcomes, strict=True):
        assert _distance(adapter, _of_peft(model, adapter, each)) < 1e-5
        expected = sum(
            -float((p * d.weights).sum()) for p, d in zip(outcome.logprobs, each, strict=True)
        )
        assert outcome.loss == pytest.approx(expected, rel=1e-5)


def test_gradients_of_dropout_are_those_of_peft_with_the_same_masks() -> None:
    model = tiny_model("qwen2")
    engine = _engine(model)
    shape = LoraShape(4, 8.0, dropout=0.3)
    adapter, twin = (_with_values(engine.new_adapter(shape, 3), 0) for _ in range(2))
    data = [_datum(1, 30)]
    engine.forward_backward([Work(adapter, data)])
    dropout = twin.next_dropout()
    assert _distance(adapter, _of_peft(model, adapter, data, dropout)) < 1e-5
    assert _distance(adapter, _of_peft(model, adapter, data)) > 1e-2
    before = engine.forward_backward([Work(adapter, data)], backward=False)[0].loss
    plain = _with_values(engine.new_adapter(LoraShape(4, 8.0), 3), 0)  # no dropout in evaluations
    assert before == engine.forward_backward([Work(plain, data)], backward=False)[0].loss


def test_masks_keep_their_share_and_differ_by_linear_pass_and_step() -> None:
    adapter = LearningAdapter(LoraShape(1, 1.0, dropout=0.25), {"x": (torch.ones(1, 1),) * 2})
    like = torch.ones(100, 100)
    passes = [adapter.next_dropout(), adapter.next_dropout()]
    adapter.step(Adam(lr=0.0))
    passes.append(adapter.next_dropout())
    masks = [dropout.mask(name, like) for dropout in passes for name in ("q", "k")]
    for i, mask in enumerate(masks):
        assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert float(mask.mean()) == pytest.approx(1.0, abs=0.03)
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_gradients_of_a_choice_of_layers_are_those_of_peft() -> None:
    model = tiny_model("llama")
    engine = _engine(model)
    adapter = _with_values(
        engine.new_adapter(LoraShape(4, 8.0, ("q_proj", "down_proj"), layers=(1, 2)), 0), 0
    )
    engine.forward_backward([Work(adapter, [_datum(1, 30)])])
    assert _distance(adapter, _of_peft(model, adapter, [_datum(1, 30)])) < 1e-5
    with pytest.raises(TrainingError, match="no layer 3"):
        engine.new_adapter(LoraShape(4, 8.0, layers=(1, 3)), 0)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # with biases; with Conv1D
def test_gradients_of_dora_are_those_of_peft_beside_a_plain_lora(family: str) -> None:
    model = tiny_model(family)
    engine = _engine(model)
    dora = new_adapter(engine, AdapterShape("dora", rank=4, alpha=8.0), 0, [])
    plain = _with_values(engine.new_adapter(LoraShape(4, 8.0), 1), 1)
    bare = Work(LearningAdapter(plain.shape, {}), [_datum(1, 30)])
    base = engine.forward_backward([bare], backward=False)[0]
    fresh = engine.forward_backward([Work(dora, [_datum(1, 30)])], backward=False)[0]
    assert fresh.loss == pytest.approx(base.loss, rel=1e-5)  # m starts as the norm
    _with_values(dora, 0)
    for name, parameter in dora.parameters.items():
        if name.endswith("magnitude_vector"):
            parameter.data.mul_(1.2)
    dora.refresh()
    data = [_datum(1, 30, 12), _datum(2, 21, 12)]
    engine.forward_backward([Work(dora, data), Work(plain, [_datum(3, 17)])])
    assert engine.n_shared == 1
    assert _distance(dora, _of_peft(model, dora, data)) < 1e-5
    assert _distance(plain, _of_peft(model, plain, [_datum(3, 17)])) < 1e-5
    norm_of_step = dora.gains
    engine.step(dora, Adam(lr=0.1))
    assert not torch.equal(dora.gains[next(iter(norm_of_step))], next(iter(norm_of_step.values())))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_changes_no_bit_and_keeps_less(family: str) -> None:
    model = tiny_model(family)
    data = [_datum(1, 30, 12), _datum(2, 21, 12)]
    kept, gradients = [], []
    for checkpointing in (False, True):
        weights = ModelWeights(model)
        engine = TrainingEngine(
            FrozenModel(
                model.config, weights, dtype=torch.float32, gradient_checkpointing=checkpointing
            )
        )
        shape = LoraShape(4, 8.0, dropout=0.1)
        first, second = (_with_values(engine.new_adapter(shape, i), i) for i in range(2))
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.forward_backward([Work(first, data), Work(second, [_datum(3, 17)])])
        kept.append(sum(sizes))
        gradients.append([p.grad for a in (first, second) for p in a.parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_right_answers_and_tokens_are_those_that_the_model_itself_would_give() -> None:
    model = tiny_model()
    engine = _engine(model)
    data = []
    for seed, wrong in ((1, 0), (2, 2)):
        datum = _datum(seed, 20)
        with torch.no_grad():
            targets = model(input_ids=datum.tokens[None]).logits[0].argmax(-1)
        at = datum.weights.nonzero().squeeze(1)[:wrong]
        targets[at] = (targets[at] + 1) % 60
        data.append(replace(datum, targets=targets))
    work = Work(LearningAdapter(LoraShape(), {}), data)
    (outcome,) = engine.forward_backward([work], backward=False)
    assert outcome.right == [True, False]
    assert outcome.n_right == sum(datum.n_answers for datum in data) - 2


def test_many_batches_add_up() -> None:
    engine = _engine(tiny_model())
    adapter = _with_values(engine.new_adapter(LoraShape(4, 8.0), 0), 0)
    data = [_datum(seed, 60) for seed in range(40)]
    engine.forward_backward([Work(adapter, data)])
    assert engine.n_forwards > 1
    assert _distance(adapter, _of_peft(tiny_model(), adapter, data)) < 1e-5


def test_steps_are_those_of_adamw_and_a_state_goes_on_to_the_same_bits() -> None:
    engine = _engine(tiny_model())
    adam = Adam(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
    adapter = _with_values(engine.new_adapter(LoraShape(4, 8.0), 0), 0)
    twins = [p.detach().clone().requires_grad_() for p in adapter.parameters.values()]
    torchs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        engine.forward_backward([Work(adapter, [_datum(seed, 20)])])
        for twin, parameter in zip(twins, adapter.parameters.values(), strict=True):
            assert parameter.grad is not None
            twin.grad = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        assert engine.step(adapter, adam) == pytest.approx(float(norm), rel=1e-5)
        torchs.step()
    for twin, parameter in zip(twins, adapter.parameters.values(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)

    later = engine.new_adapter(LoraShape(4, 8.0), 7)
    later.load_state(adapter.state())
    for each in (adapter, later):
        engine.forward_backward([Work(each, [_datum(9, 20)])])
        engine.step(each, adam)
    assert all(torch.equal(p, later.parameters[n]) for n, p in adapter.parameters.items())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    engine = _engine(tiny_model())
    adapter = engine.new_adapter(LoraShape(4, 8.0), 0)
    before = adapter.tensors()
    engine.forward_backward([Work(adapter, [_datum(0, 8)], lambda p, d: p.sum() * torch.inf)])
    with pytest.raises(TrainingError, match="lower the learning rate"):
        engine.step(adapter, Adam(lr=1.0))
    assert all(torch.equal(p, before[n]) for n, p in adapter.parameters.items())


def test_unknown_targets_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(TrainingError, match="down_proj"):
        _engine(tiny_model()).new_adapter(LoraShape(4, 8.0, ("nothing",)), 0)
