"""How a model computes logits from the head's output, found by running its own forward.

``logits = scale · head`` or, with a soft cap c, ``logits = c · tanh(scale · head / c)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UnsupportedBase

__all__ = ["LogitsFormula", "probe_values"]

_TOLERANCE = 1e-5  # relative: some models compute logits in float32


@dataclass(frozen=True, slots=True)
class LogitsFormula:
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_monotonic(self) -> bool:
        """Whether logits are ordered as the head's output is, ties included."""
        return self.softcap is None and self.scale > 0

    def after(self, factor: float) -> LogitsFormula:
        """The formula for an output that is yet to be multiplied by ``factor``."""
        return LogitsFormula(self.scale * factor, self.softcap)

    def finish(self, out: Tensor) -> Tensor:
        """Turns the head's output, float32, into logits in place."""
        if self.softcap is None:
            return out if self.scale == 1.0 else out.mul_(self.scale)
        return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    @staticmethod
    def fit(head_output: Tensor, logits: Tensor) -> LogitsFormula:
        """From what the model made of ``probe_values``. Raises UnsupportedBase if neither fits."""
        x, y = head_output.double(), logits.double()
        nearest, farthest = x.abs().argmin(), x.argmax()
        scale, cap = float(y[nearest] / x[nearest]), float(y[farthest])
        for formula in (LogitsFormula(scale), LogitsFormula(scale, abs(cap) or None)):
            if _agrees(y, formula.finish(x.clone())):
                return formula
        raise UnsupportedBase(
            "its logits are neither the head's output times a constant nor a soft cap of that: "
            f"of {float(x[nearest]):g} it makes {float(y[nearest]):g}, of {float(x[farthest]):g} "
            f"{cap:g}"
        )


def probe_values(n: int) -> Tensor:
    """float64 [n] from -10⁴ to 10⁴, dense around 0, where neither scale nor cap can hide."""
    half = torch.logspace(-3, 4, n - n // 2, dtype=torch.float64)
    return torch.cat([-half[: n // 2].flip(0), half])


def _agrees(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= _TOLERANCE * expected.abs() + 1e-12).all())
