"""A norm is replaced by the fused one only where both compute the same."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loraplex_server.model.layers.adapted_modules import AdaptedNorm, RmsNorm, replace_norms
from loraplex_server.model.layers.forward_context import ForwardContext

_WIDTH = 24


class _OwnRMSNorm(LlamaRMSNorm):  # type: ignore[misc]  # untyped library
    """Has the name and the fields of an RMSNorm, and squares its weight."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out * self.weight


def _replaced(norm: nn.Module) -> nn.Module:
    model = nn.Module()
    model.norm = norm
    replace_norms(model, ForwardContext())
    return model.get_submodule("norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_an_rms_norm_runs_fused_with_and_without_one_added(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    norm = kind(_WIDTH, eps=1e-5).to(dtype)
    nn.init.normal_(norm.get_parameter("weight"))
    x = torch.randn(3, _WIDTH).to(dtype)
    expected = norm(x)
    replaced = _replaced(norm)
    assert isinstance(replaced, RmsNorm)
    torch.testing.assert_close(replaced(x), expected)


def test_a_norm_that_computes_something_else_under_that_name_stays() -> None:
    norm = _OwnRMSNorm(_WIDTH, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, _WIDTH)
    expected = norm(x)
    replaced = _replaced(norm)
    assert isinstance(replaced, AdaptedNorm)
    torch.testing.assert_close(replaced(x), expected)
