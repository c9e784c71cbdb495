"""Adapters are refused if the engine cannot apply every part of them."""

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store import plan as plans
from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, Family, ModulePlan
from loraplex_server.engine.adapters.capabilities import EngineCapabilities
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.vision.layouts import Sight
from tests.support.adapters.routed_plans import lora_plan, mixlora_plan
from tests.support.bases.architectures import ARCHITECTURES, tiny_model

_Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def capabilities(model: PreTrainedModel) -> EngineCapabilities:
    return EngineCapabilities.of(BaseSpec.of(model, "tiny"))


def _classes_of_plans() -> list[type]:
    own = (
        kind for kind in vars(plans).values() if getattr(kind, "__module__", "") == plans.__name__
    )
    return [kind for kind in own if hasattr(kind, "__dataclass_fields__")]


# The fields that the engine applies. A new field needs an executor before it is added here.
_APPLIED_FIELDS: Mapping[type, set[str]] = {
    AdapterPlan: {"digest", "family", "chat_template", "n_bytes", "packed_adapter", "pooling"}
    | {"modules", "experts", "prefix", "embedding_rows", "head_rows", "replaced_weights", "norms"}
    | {"stacked", "head", "invocation"},
    ModulePlan: {"a", "b", "out_scale", "bias", "in_scale", "shared"}
    | {"input_operator", "delta_operator", "output_operator"},
    plans.SharedBasis: {"basis_digest", "a", "b", "rank_scale", "block_scale", "out_scale"}
    | {"transposed"},
    plans.NormPlan: {"weight", "bias"},
    plans.HeadPlan: {"task", "weight", "bias", "labels", "activation"},
    plans.PoolingPlan: {"mode", "normalize"},
    ExpertPlan: {"gate", "strategy", "top_k", "top_p", "experts"},
    plans.PrefixPlan: {"keys", "values", "embeddings"},
    plans.StackedFactors: {"left", "right"},
}


@pytest.mark.parametrize("kind", _classes_of_plans(), ids=lambda kind: kind.__name__)
def test_every_field_of_a_plan_is_applied_by_the_engine(kind: type) -> None:
    assert _APPLIED_FIELDS[kind] == {spec.name for spec in fields(kind)}


def _refusal(capabilities: EngineCapabilities, plan: AdapterPlan) -> str:
    with pytest.raises(UnsupportedAdapter) as refused:
        capabilities.check(plan)
    return str(refused.value)


def _plan(modules: Mapping[str, ModulePlan]) -> AdapterPlan:
    return AdapterPlan("d" * 64, Family.LORA, modules)


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "vision.q_proj"])
def test_a_module_that_the_base_lacks_is_refused_by_name(
    name: str, capabilities: EngineCapabilities
) -> None:
    assert name in _refusal(capabilities, _plan({name: ModulePlan(bias=torch.ones(64))}))


def test_a_weight_in_place_of_something_that_is_no_linear_is_refused_by_name(
    capabilities: EngineCapabilities,
) -> None:
    plan = replace(_plan({}), replaced_weights={"model.rotary_emb": torch.ones(4)})
    assert "model.rotary_emb.weight" in _refusal(capabilities, plan)


def test_an_activated_adapter_is_refused_where_all_tokens_of_a_prompt_see_one_another(
    capabilities: EngineCapabilities,
) -> None:
    plan = replace(_plan({_Q: ModulePlan(bias=torch.ones(64))}), invocation=(1,))
    capabilities.check(plan)
    assert "reads a prompt with images at once" in _refusal(
        replace(capabilities, sight=Sight.PROMPT), plan
    )


def test_a_prefix_for_another_depth_is_refused(capabilities: EngineCapabilities) -> None:
    layers = (torch.zeros(2, 2, 16),) * 2
    plan = replace(_plan({}), prefix=plans.PrefixPlan(layers, layers))
    assert "2 layers, this base has 3" in _refusal(capabilities, plan)


def test_all_problems_are_told_at_once(capabilities: EngineCapabilities) -> None:
    bias = ModulePlan(bias=torch.ones(1))
    with pytest.raises(UnsupportedAdapter) as refused:
        capabilities.check(_plan({"first": bias, "second": bias}))
    assert [problem.partition(":")[0] for problem in refused.value.problems] == ["first", "second"]


def test_experts_where_nothing_routes_are_refused_by_name(
    model: PreTrainedModel, capabilities: EngineCapabilities
) -> None:
    plan = mixlora_plan(model, n_experts=2, top_k=1, rank=2, seed=3)
    capabilities.check(plan)
    stray = replace(plan, experts={f"{name}.x": part for name, part in plan.experts.items()})
    assert "model.layers.0.mlp.x: no gated MLP" in _refusal(capabilities, stray)


def test_an_expert_with_more_than_factors_is_refused_by_name(
    model: PreTrainedModel, capabilities: EngineCapabilities
) -> None:
    plan = mixlora_plan(model, n_experts=2, top_k=1, rank=2, seed=3)
    place, block = next(iter(plan.experts.items()))
    name, module = next(iter(block.experts[1].items()))
    scaled = replace(module, in_scale=torch.ones(module.a.shape[1]))  # type: ignore[union-attr]
    experts = (block.experts[0], {**block.experts[1], name: scaled})
    plan = replace(plan, experts={**plan.experts, place: replace(block, experts=experts)})
    assert f"{name} of expert 1.in_scale" in _refusal(capabilities, plan)


def test_experts_and_plain_factors_on_one_module_are_refused(
    model: PreTrainedModel, capabilities: EngineCapabilities
) -> None:
    plan = mixlora_plan(model, n_experts=2, top_k=1, rank=2, seed=3)
    expert: ExpertPlan = next(iter(plan.experts.values()))
    plan = replace(plan, modules={**plan.modules, **expert.experts[0]})
    assert "experts and plain factors" in _refusal(capabilities, plan)


def test_a_rank_above_the_servers_is_refused_with_its_option(model: PreTrainedModel) -> None:
    capabilities = EngineCapabilities.of(BaseSpec.of(model, "tiny"), max_rank=8)
    capabilities.check(lora_plan(model, rank=8, seed=1))
    with pytest.raises(LimitExceeded, match=r"rank 9 on .*proj.* allows 8.*--max-lora-rank"):
        capabilities.check(lora_plan(model, rank=9, seed=1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_base_that_does_not_run_is_judged_as_the_one_that_runs(name: str) -> None:
    spec = BaseSpec.of(tiny_model(name), "tiny")
    assert EngineCapabilities.of(spec) == EngineCapabilities.of_model(
        BaseModel(tiny_model(name), "tiny")
    )
