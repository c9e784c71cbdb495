"""Spectra, norms and intruder dimensions, against dense arithmetic."""

import pytest
import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.fold.spectrum import (
    count_intruders,
    factor_norm,
    inspect_plan,
    singular_values,
)
from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan
from tests.support.bases.tiny_models import tiny_gpt2, tiny_llama

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def test_norm_and_spectrum_need_no_dense_delta() -> None:
    a, b = torch.randn(5, 40), torch.randn(30, 5)
    dense = b @ a
    assert factor_norm(a, b) == pytest.approx(float(dense.norm()), rel=1e-6)
    assert torch.allclose(singular_values(a, b), torch.linalg.svdvals(dense)[:5], rtol=1e-5)


def test_a_strong_new_direction_is_an_intruder_and_a_scaled_old_one_is_not() -> None:
    weight = torch.linalg.qr(torch.randn(40, 40))[0] @ torch.diag(torch.linspace(2, 0.1, 40))
    u, _, vh = torch.linalg.svd(weight)
    # A direction spread evenly over all of the base's vectors: cosine 1/√40 with each.
    spread_u, spread_v = u.sum(dim=1, keepdim=True) / 40**0.5, vh.sum(dim=0, keepdim=True) / 40**0.5
    assert count_intruders(weight, spread_v, spread_u * 50) >= 1
    assert count_intruders(weight, vh[3:4], u[:, 3:4] * 0.5) == 0


def test_inspection_reports_each_linear(base: BaseSpec) -> None:
    a, b = torch.randn(4, 32), torch.randn(32, 4) * 0.1
    plan = AdapterPlan("d", Family.LORA, {Q0: ModulePlan(a=a, b=b)})
    (found,) = inspect_plan(plan, base, intruders=True)
    weight = base.weight(Q0)
    assert found.delta_ratio == pytest.approx(float((b @ a).norm() / weight.norm()), rel=1e-4)
    assert 1 < found.effective_rank <= 4
    assert found.n_intruders is not None
    assert inspect_plan(plan, base)[0].n_intruders is None


def test_the_base_spec_reads_geometry_and_weights() -> None:
    model = tiny_llama(tied=True)
    spec = BaseSpec.of(model, "tiny")
    assert spec.tie_word_embeddings
    assert (spec.input_embedding, spec.output_head) == ("model.embed_tokens", "lm_head")
    assert (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.head_dim) == (3, 4, 2, 8)
    assert spec.modules[Q0].in_features == 32
    assert torch.equal(spec.weight(Q0), model.get_submodule(Q0).weight)


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype() -> None:
    model = tiny_llama()
    first = BaseSpec.of(model, "a").fingerprint
    assert BaseSpec.of(model.to(torch.bfloat16), "b").fingerprint == first
    assert BaseSpec.of(tiny_llama(seed=1), "a").fingerprint != first


def test_conv1d_weights_come_out_as_linears() -> None:
    model = tiny_gpt2()
    spec = BaseSpec.of(model, "gpt2")
    name = "transformer.h.0.attn.c_attn"
    assert name in spec.conv1d
    assert spec.weight(name).shape == (96, 32)
    assert spec.modules[name].out_features == 96
