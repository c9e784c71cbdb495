"""How logits follow from the head's output is found from values alone."""

import pytest
import torch
from torch import Tensor

from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.tracing.model_trace import LogitsFormula, probe_values

_FORMULAS = [
    LogitsFormula(),
    LogitsFormula(1 / 16),
    LogitsFormula(2.5),
    LogitsFormula(-0.5),
    LogitsFormula(1.0, 30.0),
    LogitsFormula(0.25, 50.0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("formula", _FORMULAS)
def test_scale_and_soft_cap_are_found(formula: LogitsFormula, dtype: torch.dtype) -> None:
    x = probe_values(301)
    scaled = x * formula.scale
    cap = formula.softcap
    y = scaled if cap is None else cap * torch.tanh(scaled / cap)
    found = LogitsFormula.fit(x, y.to(dtype))
    assert found.scale == pytest.approx(formula.scale, rel=1e-6)
    assert found.softcap == (None if cap is None else pytest.approx(cap, rel=1e-6))
    torch.testing.assert_close(found.finish(x.clone()), y, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "other",
    [lambda x: x + 1, lambda x: x.clamp(-5, 5), lambda x: x.relu(), lambda x: x.log_softmax(-1)],
    ids=["shifted", "clamped", "cut", "normalised"],
)
def test_another_formula_is_refused(other: object) -> None:
    x = probe_values(301)
    assert callable(other)
    y: Tensor = other(x)
    with pytest.raises(UnsupportedBase, match="neither the head's output times a constant"):
        LogitsFormula.fit(x, y)


def test_a_factor_before_the_head_joins_the_scale() -> None:
    assert LogitsFormula(0.5, 30.0).after(0.25) == LogitsFormula(0.125, 30.0)


def test_only_a_positive_scale_keeps_the_order_for_sure() -> None:
    assert LogitsFormula(0.5).is_monotonic
    assert not LogitsFormula(-0.5).is_monotonic
    assert not LogitsFormula(1.0, 30.0).is_monotonic
