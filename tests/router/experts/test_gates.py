import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_router.experts.gates import (
    NO_EXPERT,
    Routing,
    experts_per_row,
    gate_dense,
    gate_switch,
    gate_top_k,
    gate_top_p,
    route,
)
from tests.support.adapters.experts_oracle import gate_weights


def as_dict(routing: Routing, row: int) -> dict[int, float]:
    pairs = zip(routing.expert_index[row].tolist(), routing.weight[row].tolist(), strict=True)
    return {e: w for e, w in pairs if e != NO_EXPERT}


@pytest.mark.parametrize("strategy", list(RoutingStrategy))
@given(
    n_experts=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    top_p=st.sampled_from([0.0, 0.3, 0.8, 0.99, 1.0]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_strategy_agrees_with_the_formula_row_by_row(
    strategy: RoutingStrategy,
    n_experts: int,
    seed: int,
    spread: float,
    top_p: float,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 12, generator=generator)
    gate = torch.randn(n_experts, 12, generator=generator) * spread
    routing = route(hidden, gate, strategy, top_k=top_k, top_p=top_p)
    assert routing.expert_index.dtype == torch.int32
    assert routing.weight.dtype == torch.float32
    assert routing.expert_index.shape == (5, experts_per_row(strategy, n_experts, top_k))
    for row in range(5):
        want = gate_weights(gate @ hidden[row], strategy.value, top_k, top_p)
        got = as_dict(routing, row)
        # A running sum within rounding of top_p may fall on either side.
        for e in want.keys() | got.keys():
            if strategy is RoutingStrategy.TOP_P and (e in want) != (e in got):
                total = sum(sorted(want.values(), reverse=True))
                assert min(want.get(e, 0.0), got.get(e, 0.0)) < 1e-6 or abs(total - top_p) < 1e-5
                continue
            assert got.get(e, 0.0) == pytest.approx(want.get(e, 0.0), abs=2e-5)


def test_top_k_weights_sum_to_one_and_equal_logits_go_to_the_lower_index() -> None:
    routing = gate_top_k(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 0.0]]), 2)
    assert routing.expert_index.tolist() == [[0, 1], [1, 2]]
    assert routing.weight.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_top_p_keeps_the_expert_that_crosses_and_does_not_renormalise() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    routing = gate_top_p(logits, 0.7)
    assert routing.expert_index.tolist() == [[0, 1, NO_EXPERT, NO_EXPERT]]
    assert routing.weight[0].tolist() == pytest.approx([0.5, 0.3, 0.0, 0.0])


def test_top_p_of_one_keeps_every_expert() -> None:
    routing = gate_top_p(torch.randn(4, 6), 1.0)
    assert (routing.expert_index >= 0).all()
    assert routing.weight.sum(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_switch_weighs_the_best_expert_by_its_probability() -> None:
    routing = gate_switch(torch.tensor([[0.2, 0.7, 0.1]]).log())
    assert routing.expert_index.tolist() == [[1]]
    assert routing.weight[0].tolist() == pytest.approx([0.7])


def test_dense_uses_all_experts_in_order() -> None:
    routing = gate_dense(torch.zeros(2, 4))
    assert routing.expert_index.tolist() == [[0, 1, 2, 3]] * 2
    assert routing.weight.tolist() == [[0.25] * 4] * 2


def test_the_gate_computes_in_float32_when_rows_are_bfloat16() -> None:
    hidden = torch.randn(64, 32).bfloat16()
    gate = torch.randn(8, 32) * 0.02
    low = route(hidden, gate, RoutingStrategy.TOP_K, top_k=2, top_p=0.0)
    full = route(hidden.float(), gate, RoutingStrategy.TOP_K, top_k=2, top_p=0.0)
    assert torch.equal(low.expert_index, full.expert_index)
    assert torch.equal(low.weight, full.weight)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_the_number_of_experts_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        gate_top_k(torch.zeros(1, 4), top_k)
