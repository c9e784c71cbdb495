import pytest
import torch

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_router.experts.gates import arrow_prototypes, route, top_right_singular_vector


@pytest.mark.parametrize(
    ("out", "rank", "width"), [(7, 1, 5), (40, 4, 24), (8, 16, 33), (64, 8, 8)]
)
def test_the_prototype_is_the_top_right_singular_vector_of_the_product(
    out: int, rank: int, width: int
) -> None:
    b, a = torch.randn(out, rank), torch.randn(rank, width)
    v = top_right_singular_vector(b, a)
    want = torch.linalg.svd(b @ a).Vh[0]
    assert abs(float(v @ want)) == pytest.approx(1.0, abs=1e-4)
    assert float(v[v.abs().argmax()]) > 0


def test_a_rank_larger_than_the_input_width_is_fine() -> None:
    b, a = torch.randn(6, 9), torch.randn(9, 4)
    want = torch.linalg.svd(b @ a).Vh[0]
    assert abs(float(top_right_singular_vector(b, a) @ want)) == pytest.approx(1.0, abs=1e-4)


def test_a_zero_lora_attracts_nothing() -> None:
    assert not top_right_singular_vector(torch.zeros(6, 2), torch.randn(2, 4)).any()


def test_arrow_follows_peft_on_scores_and_temperature() -> None:
    """PEFT: softmax(|x·v| / τ) over the k largest, each adapter's own scale outside."""
    factors = [(torch.randn(10, r), torch.randn(r, 16)) for r in (2, 4, 8, 4)]
    x = torch.randn(6, 16)
    protos = arrow_prototypes(factors)
    tempered = arrow_prototypes(factors, temperature=0.5)
    routing = route(x, tempered, RoutingStrategy.ARROW, top_k=3, top_p=0.0)
    similarity = (x @ protos.T).abs()
    top, index = similarity.topk(3, dim=1)
    full = torch.full_like(similarity, float("-inf")).scatter_(1, index, top)
    want = torch.softmax(full / 0.5, dim=1)
    got = torch.zeros(6, 4).scatter_(1, routing.expert_index.long(), routing.weight)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
