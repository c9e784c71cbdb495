"""Rows of the PEFT tables, and ways to train them at random."""

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

LAYERS = (1, 4)  # adapted by most rows


@dataclass(frozen=True)
class PeftRow:
    """An adapter that PEFT makes, trains at random and saves. PEFT's model is the oracle."""

    id: str  # docs/families.md names it
    config: Callable[[], peft.PeftConfig]
    train: Callable[[peft.PeftModel], None]
    start: Callable[[nn.Module, peft.PeftConfig], None] | None = None  # on the base, before PEFT
    keeps_start: bool = False  # saved as PEFT converts it with the factors it started from
    rewrites_base: bool = False  # PEFT changes the weights of the modules it adapts
    task: str | None = None  # of a classifier: SEQ_CLS or TOKEN_CLS
    task_id: int | None = None  # of a method whose model is asked with one
    executor: bool = False  # with the references and unfused too: one row for each way to serve
    refused: str | None = None  # pattern of the reason, where it is not served
    wrong: str | None = None  # what the server does instead, while it is wrong


def seen_gradients(model: nn.Module, config: peft.PeftConfig) -> None:
    """LoRA-GA starts from the gradients of a sample."""

    def step() -> None:
        ids = torch.arange(500, 540)[None]
        model(input_ids=ids, labels=ids).loss.backward()

    preprocess_loraga(model, config, step)


def on(*leaves: str, layers: tuple[int, ...] = LAYERS) -> str:
    """A pattern of these projections in two layers."""
    return rf".*\.({'|'.join(map(str, layers))})\.(self_attn|mlp)\.({'|'.join(leaves)})"


def moved(std: float) -> Callable[[peft.PeftModel], None]:
    """Every trainable value moves by ``std`` times a normal draw from where PEFT starts it."""

    def train(model: peft.PeftModel) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += std * noise

    return train


def drawn(std: float) -> Callable[[peft.PeftModel], None]:
    """Every trainable value is drawn anew: soft prompts as large as the base's embeddings."""

    def train(model: peft.PeftModel) -> None:
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))

    return train


def kept_ranks(std: float) -> Callable[[peft.PeftModel], None]:
    """AdaLoRA as its training ends: pruned ranks are zero, and the config lists the kept ones."""

    def train(model: peft.PeftModel) -> None:
        moved(std)(model)
        pattern: dict[str, list[bool]] = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_E"):
                keep = [True, False, True, False, False, True] if "q_proj" in name else [False] * 6
                module.lora_E["default"].data[~torch.tensor(keep)] = 0
                pattern[f"{name.removeprefix('base_model.model.')}.lora_E"] = keep
        model.peft_config["default"].rank_pattern = pattern

    return train
