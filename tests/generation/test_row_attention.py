"""Attention by rows, the norm and the rotation: against torch's own over the whole packed batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation.rms_norm import rms_norm
from loraplex_generation.rotary import rotated
from loraplex_generation.row_attention import RowPlan, attend

N_HEADS, N_KV, WIDTH = 4, 2, 6
GROUPS = {
    "one adapter, rows of one length": (3, [[4, 4, 4]]),
    "two adapters, one of them shorter": (2, [[5, 1, 9, 2], [3]]),
    "no head": (0, [[2, 7], [6, 4, 1]]),
    "a long row among short ones": (4, [[2, 31, 3, 2]]),
}


def _packed(n_head: int, groups: list[list[int]]) -> tuple[RowPlan, Tensor, Tensor]:
    """The plan; who may see whom, bool [n_adapters, length, length]; what is a token of a row."""
    length = n_head + max(sum(lengths) for lengths in groups)
    owner = torch.full((len(groups), length), -1)
    for g, lengths in enumerate(groups):
        ends = [*[0] * n_head, *[i + 1 for i, n in enumerate(lengths) for _ in range(n)]]
        owner[g, : len(ends)] = torch.tensor(ends)
    same = owner[:, :, None] == owner[:, None, :]
    seen = torch.ones(length, length).tril().bool() & (same | (owner == 0)[:, None, :])
    return RowPlan.of(n_head, groups, length), seen, owner >= 0


def _inputs(used: Tensor) -> Tensor:
    torch.manual_seed(0)
    shape = (used.numel(), N_HEADS + 2 * N_KV, WIDTH)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", GROUPS)
def test_a_row_attends_to_its_head_and_itself_as_under_a_mask(name: str) -> None:
    plan, seen, used = _packed(*GROUPS[name])
    x = _inputs(used)
    ours = attend(x, plan, N_HEADS, N_KV)
    q, k, v = torch.split(
        x.view(*used.shape, -1, WIDTH).transpose(1, 2), [N_HEADS, N_KV, N_KV], dim=1
    )
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    theirs = theirs.transpose(1, 2).reshape(used.numel(), -1)
    real = used.flatten()
    torch.testing.assert_close(ours[real], theirs[real])
    weight = torch.randn(int(real.sum()), N_HEADS * WIDTH, dtype=torch.float64)
    mine = torch.autograd.grad((ours[real] * weight).sum(), x)[0]
    torch.testing.assert_close(mine, torch.autograd.grad((theirs[real] * weight).sum(), x)[0])


@pytest.mark.parametrize("name", GROUPS)
def test_the_gradient_of_attention_by_rows_is_its_difference(name: str) -> None:
    plan, _, used = _packed(*GROUPS[name])
    x, real = _inputs(used), used.flatten()
    assert torch.autograd.gradcheck(lambda x: attend(x, plan, N_HEADS, N_KV)[real], (x,))


def test_the_norm_and_its_gradient_are_those_of_torch() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))


def test_the_rotation_and_its_gradient_are_those_of_the_formula() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, 4, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    turned = x * cos + torch.cat([-second, first], -1) * sin
    expected = torch.cat([turned[:, :2], x[:, 2:]], 1)
    torch.testing.assert_close(rotated(x, cos, sin, 2), expected)
    assert torch.autograd.gradcheck(lambda x: rotated(x, cos, sin, 2), (x,))
