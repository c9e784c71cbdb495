"""Prefix tuning: PEFT's gradients, beside other adapters, and a file that PEFT reads."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_training.config import AdapterShape, PrefixShape
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.errors import TrainingError
from loraplex_training.families.table import new_adapter
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_models import untouched

# PEFT passes the cache by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
SHAPE = AdapterShape("prefix", prefix=PrefixShape(5))
HEAD = torch.randint(3, 60, (9,), generator=torch.Generator().manual_seed(7))


def _datum(seed: int, n: int, head: Tensor = HEAD) -> Datum:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.cat([head, torch.randint(3, 60, (n,), generator=random)])
    weights = torch.zeros(len(tokens) - 1)
    weights[len(head) + 1 :] = 0.1
    return Datum(tokens[:-1], tokens[1:], weights)


def _engine(model: PreTrainedModel, *, checkpointing: bool = False) -> TrainingEngine:
    weights = ModelWeights(model)
    return TrainingEngine(
        FrozenModel(
            model.config, weights, dtype=torch.float32, gradient_checkpointing=checkpointing
        )
    )


def _logprobs(model: torch.nn.Module, datum: Datum) -> Tensor:
    logits = model(input_ids=datum.tokens[None]).logits[0]
    return logits.log_softmax(-1).gather(1, datum.targets[:, None])[:, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_are_those_of_peft_beside_other_adapters(
    family: str, checkpointing: bool
) -> None:
    model = tiny_model(family)
    engine = _engine(model, checkpointing=checkpointing)
    data = [_datum(1, 12), _datum(2, 7), _datum(3, 20)]
    adapter, other = (new_adapter(engine, SHAPE, 0, data[i:]) for i in range(2))
    plain = engine.new_adapter(LoraShape(4, 8.0), 0)
    alone = engine.forward_backward([Work(plain, data)], backward=False)[0]
    works = [Work(other, data[:1]), Work(plain, data), Work(adapter, data)]
    _, beside, outcome = engine.forward_backward(works)
    assert engine.n_shared == 1
    assert beside.loss == pytest.approx(alone.loss, rel=1e-5)

    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(untouched(model), settings)
    (flat,) = adapter.tensors().values()
    peft.set_peft_model_state_dict(tuned, {"prompt_embeddings": flat})
    tuned = tuned.double().eval()
    loss = sum(-(_logprobs(tuned, datum) * datum.weights).sum() for datum in data)
    loss.backward()
    assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = tuned.prompt_encoder["default"].embedding.weight.grad
    (parameter,) = adapter.parameters.values()
    distance = (parameter.grad.flatten(1).double() - expected).norm() / expected.norm()
    assert distance < 1e-5


def test_a_prefix_starts_as_text_before_the_text_and_its_file_is_pefts(tmp_path: Path) -> None:
    model = tiny_model()
    engine = _engine(model)
    datum = _datum(1, 12)
    adapter = new_adapter(engine, SHAPE, 0, [datum])
    started = engine.forward_backward([Work(adapter, [datum])], backward=False)[0]
    tokens = torch.cat([datum.tokens[:5], datum.tokens])
    padded = Datum(
        tokens,
        torch.cat([datum.tokens[:5], datum.targets]),
        torch.cat([torch.zeros(5), datum.weights]),
    )
    base = LearningAdapter(LoraShape(), {})
    as_text = engine.forward_backward([Work(base, [padded])], backward=False)[0]
    assert started.loss == pytest.approx(as_text.loss, rel=1e-5)
    for _ in range(10):
        engine.forward_backward([Work(adapter, [datum])])
        engine.step(adapter, Adam(0.05))
    trained = engine.forward_backward([Work(adapter, [datum])], backward=False)[0]
    assert trained.loss < started.loss - 0.2
    adapter.save(tmp_path, "tiny")
    tuned = peft.PeftModel.from_pretrained(untouched(model), tmp_path)
    with torch.inference_mode():
        theirs = _logprobs(tuned, datum) * (datum.weights != 0)
    assert (trained.logprobs[0] - theirs).abs().max() < 1e-4


def test_a_prefix_without_data_is_refused() -> None:
    with pytest.raises(TrainingError, match="needs some"):
        new_adapter(_engine(tiny_model()), SHAPE, 0, [])
