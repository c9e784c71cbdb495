"""The round trip of a family: train at random, save, read and serve."""

from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.fold.reader import Reading
from loraplex_adapter_store.plan import AdapterPlan
from tests.support.adapters.plan_executor import plan_logits
from tests.support.bases.tiny_models import PROMPT, read_path, untouched

TOLERANCE = 1e-4


def randomise(model: nn.Module, std: float = 0.2, seed: int = 1) -> None:
    """Give every trained tensor random values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * std
            with torch.no_grad():
                parameter.copy_(noise + (parameter if "magnitude" in name or "norm" in name else 0))


def trained(
    model: PreTrainedModel, config: peft.PeftConfig, path: Path, std: float = 0.2
) -> Tensor:
    """Train at random, save to ``path`` and return the logits of the trained model."""
    peft_model = peft.get_peft_model(untouched(model), config)
    randomise(peft_model, std)
    peft_model.eval()
    peft_model.save_pretrained(path)
    with torch.inference_mode():
        return peft_model(input_ids=PROMPT).logits


def check_round_trip(
    model: PreTrainedModel, config: peft.PeftConfig, path: Path, std: float = 0.2
) -> Reading:
    """Compare with PEFT's own module as the oracle."""
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
