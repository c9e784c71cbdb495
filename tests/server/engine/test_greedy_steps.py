"""Steps whose rows all take their largest logit: no logits are kept, the tokens are the same."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.cpu import native
from loraplex_kernels.layers.packed_linear import PackedLinear
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.sampling.token_rules import no_token
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import VOCAB_SIZE, tiny_model
from tests.support.servers.engines import GREEDY, generate_all, running_engine

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler built the kernels")
PROMPTS = [[3, 17, 40], [70, 1], [100, 5, 6, 7, 8], [9]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product of which only the largest outputs were taken."""
    seen: list[int] = []
    argmax = PackedLinear.argmax

    def counted(self: PackedLinear, x: Tensor, masks: NDArray[np.int32] | None) -> Tensor:
        seen.append(len(x))
        return argmax(self, x, masks)

    monkeypatch.setattr(PackedLinear, "argmax", counted)
    return seen


def tokens(
    model: PreTrainedModel, sampling: SamplingParams, plans: list[AdapterPlan | None]
) -> list[list[int]]:
    with running_engine(model, drafts="off") as engine:
        answers = generate_all(engine, PROMPTS[: len(plans)], sampling, plans)
    return [answer.token_ids for answer in answers]


def test_the_tokens_are_those_of_steps_that_keep_their_logits(
    model: PreTrainedModel, taken: list[int]
) -> None:
    plans = [lora_plan(model, rank=4, seed=1), None, lora_plan(model, rank=17, seed=2), None]
    wanted = tokens(model, replace(GREEDY, logprobs=0), plans)
    assert not taken
    assert tokens(model, GREEDY, plans) == wanted
    assert max(taken) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside others"])
@pytest.mark.parametrize(
    "sampling", [GREEDY, replace(GREEDY, logprobs=0)], ids=["largest output", "logits"]
)
def test_an_adapter_without_a_number_in_its_logits_fails_and_says_why(
    sampling: SamplingParams, is_alone: bool, dtype: torch.dtype, model: PreTrainedModel
) -> None:
    lora = lora_plan(model, rank=4, seed=1)
    modules = {name: replace(one, b=1e38 * one.b) for name, one in lora.modules.items()}
    broken = replace(lora, digest="b" * 64, modules=modules)
    plans = [broken] if is_alone else [broken, lora, None]
    with running_engine(copy.deepcopy(model).to(dtype)) as engine:
        first, *others = generate_all(engine, PROMPTS[: len(plans)], sampling, plans)
    assert first.token_ids == []
    assert str(first.last.error) == str(no_token())
    assert all(answer.last.error is None for answer in others)


def test_an_adapter_of_the_head_has_its_say(model: PreTrainedModel, taken: list[int]) -> None:
    hidden = model.config.hidden_size
    lora = lora_plan(model, rank=4, seed=1)
    of_the_head = [
        AdapterPlan("1" * 64, lora.family, lora.modules, head_rows={7: torch.ones(hidden)}),
        AdapterPlan(
            "2" * 64, lora.family, {}, replaced_weights={"lm_head": torch.randn(VOCAB_SIZE, hidden)}
        ),
    ]
    for plan in of_the_head:
        wanted = tokens(model, replace(GREEDY, logprobs=0), [plan, lora])
        assert tokens(model, GREEDY, [plan]) == wanted[:1]
        assert not taken
        assert tokens(model, GREEDY, [plan, lora]) == wanted
        taken.clear()  # a step of the other alone may have been one


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.5},
        {"logprobs": 2},
        {"logit_bias": {4: 90.0}},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"min_tokens": 20},
    ],
    ids=str,
)
def test_what_needs_the_logits_gets_them(
    changed: dict[str, float], model: PreTrainedModel, taken: list[int]
) -> None:
    tokens(model, replace(GREEDY, **changed), [None])  # type: ignore[arg-type]
    assert not taken


def test_capped_logits_may_become_equal_so_they_are_made(taken: list[int]) -> None:
    tokens(tiny_model("gemma2"), GREEDY, [None])
    assert not taken
