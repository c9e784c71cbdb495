"""Training through the weights that serve: the same numbers, and one linear in memory at a time."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation import base_weights
from loraplex_generation.base_weights import ReadLinear
from loraplex_generation.frozen_base import FrozenBase, LoraFA
from loraplex_generation.layout import AdapterLayout
from loraplex_generation.packing import pack
from loraplex_generation.scoring import mean_nll_per_group
from loraplex_generation.zoo.tasks import Example
from loraplex_kernels.packed_linear import PackedLinear
from loraplex_server.model.base_model import BaseModel, load_base_model
from loraplex_server.model.resident_weights import ResidentWeights
from tests.support.tiny_zoo import tiny_codec, tiny_directory

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    # Wide enough that some panels are coded where this machine prefers that.
    return tiny_directory(
        folder, hidden_size=128, intermediate_size=192, tie_word_embeddings=request.param
    )


def served(folder: Path, dtype: torch.dtype) -> BaseModel:
    return load_base_model(folder, "tiny", dtype=dtype, device=CPU)


def gradient(base: FrozenBase) -> tuple[Tensor, Tensor]:
    """Loss of two adapters on three pairs, and its gradient with respect to their B."""
    codec = tiny_codec()
    layout = AdapterLayout(base.shape, first_layer=1, rank=2, alpha=4.0, seed=3)
    rows = [codec.row(Example(word, "yes")) for word in ("red", "blue", "green")]
    torch.manual_seed(1)
    b = (0.1 * torch.randn(2, layout.size)).requires_grad_()
    batch = pack(codec.head, [rows, rows[:2]])
    loss = mean_nll_per_group(base.score(batch, LoraFA(layout, b, base.dtype)).nll, batch).sum()
    torch.autograd.backward(loss)
    assert b.grad is not None
    return loss.detach(), b.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_and_gradients_are_those_of_the_file_bit_by_bit(
    folder: Path, dtype: torch.dtype
) -> None:
    resident = FrozenBase(
        folder, dtype=dtype, weights=ResidentWeights(served(folder, dtype), dtype)
    )
    expected, found = gradient(FrozenBase(folder, dtype=dtype)), gradient(resident)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1].abs().max() > 0


def test_a_server_in_float32_trains_in_bfloat16_as_the_file_does(folder: Path) -> None:
    resident = FrozenBase(
        folder, weights=ResidentWeights(served(folder, torch.float32), torch.bfloat16)
    )
    assert torch.equal(gradient(resident)[1], gradient(FrozenBase(folder))[1])


def test_one_linears_weights_are_in_memory_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most, n_read = 0, 0, 0
    matrix = PackedLinear.matrix

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(self: PackedLinear) -> Tensor:
        nonlocal alive, most, n_read
        read = matrix(self)
        weakref.finalize(read, gone)
        alive, n_read = alive + 1, n_read + 1
        most = max(most, alive)
        return read

    model = served(folder, torch.bfloat16)
    monkeypatch.setattr(PackedLinear, "matrix", counted)
    base = FrozenBase(folder, weights=ResidentWeights(model, torch.bfloat16))
    assert n_read == 0
    gradient(base)
    assert (alive, most) == (0, 1)
    assert n_read > 3 * 4  # forwards, and backwards above the lowest adapted layer


def test_the_embedding_is_the_table_that_serves(folder: Path) -> None:
    model = served(folder, torch.bfloat16)
    table = ResidentWeights(model, torch.bfloat16).tensor("model.embed_tokens.weight")
    assert table.data_ptr() == model.spec.stored("model.embed_tokens").data_ptr()


def test_the_product_that_reads_its_weights_has_the_right_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ReadLinear(lambda: weight), (x,))


def test_a_product_in_pieces_is_the_product_and_rests_before_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base_weights, "_PRODUCTS_OF_A_PIECE", 60)  # of 20 weights: three rows
    monkeypatch.setattr(base_weights, "_LEAST_ROWS", 1)
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    rests: list[int] = []
    linear = ReadLinear(lambda: weight, lambda: rests.append(1))
    torch.testing.assert_close(linear(x), F.linear(x, weight))
    assert len(rests) == 1 + 5  # before the weights are read, and before each piece of 14 rows
    assert torch.autograd.gradcheck(linear, (x,))


def test_who_trains_on_resting_weights_rests_and_finds_the_same(folder: Path) -> None:
    weights = ResidentWeights(served(folder, torch.bfloat16), torch.bfloat16)
    rests: list[int] = []
    resting = weights.resting(lambda: rests.append(1))
    found = [gradient(FrozenBase(folder, weights=each)) for each in (weights, resting)]
    n_linears = 3 * 4 + 1  # of a layer: qkv, o, gate and up, down; and the output head
    assert len(rests) > n_linears
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
