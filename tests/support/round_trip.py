"""Trains (at random), saves, reads and serves: the round trip that every family must survive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.reader import Reading
from tests.support.plan_executor import plan_logits
from tests.support.tiny_models import PROMPT, read_path, untouched

__all__ = [
    "TOLERANCE",
    "Forward",
    "check_logits",
    "check_round_trip",
    "patched_logits",
    "randomise",
    "trained",
]

Forward = Callable[[nn.Module, Tensor], Tensor]  # (the base module, its input) → output

TOLERANCE = 1e-4


def randomise(model: nn.Module, std: float = 0.2, seed: int = 1) -> None:
    """Gives every trained tensor a value that matters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * std
            with torch.no_grad():
                parameter.copy_(noise + (parameter if "magnitude" in name or "norm" in name else 0))


def trained(
    model: PreTrainedModel, config: peft.PeftConfig, path: Path, std: float = 0.2
) -> Tensor:
    """Trains (at random), saves to ``path``, and returns the logits of the training-time model."""
    peft_model = peft.get_peft_model(untouched(model), config)
    randomise(peft_model, std)
    peft_model.eval()
    peft_model.save_pretrained(path)
    with torch.inference_mode():
        return peft_model(input_ids=PROMPT).logits


def check_round_trip(
    model: PreTrainedModel, config: peft.PeftConfig, path: Path, std: float = 0.2
) -> Reading:
    """PEFT's own module is the oracle."""
    expected = trained(model, config, path, std)
    reading = read_path(path, model)
    assert not reading.report.unexpected_keys
    check_logits(model, reading.plan, expected)
    return reading


def check_logits(model: PreTrainedModel, plan: AdapterPlan, expected: Tensor) -> None:
    served = plan_logits(model, plan, PROMPT)
    with torch.inference_mode():
        base = model(input_ids=PROMPT).logits
    assert (expected - base).abs().max() > 1e-2, "the adapter must matter for the test to mean much"
    assert (served - expected).abs().max() <= TOLERANCE


def patched_logits(model: PreTrainedModel, forwards: Mapping[str, Forward]) -> Tensor:
    """Logits of a copy whose named modules compute the training-time formula instead."""
    copy = untouched(model)
    modules: dict[str, Any] = dict(copy.named_modules())
    for name, forward in forwards.items():
        module = modules[name]
        module.forward = lambda x, module=module, forward=forward: forward(module, x)
    with torch.inference_mode():
        return copy(input_ids=PROMPT).logits
