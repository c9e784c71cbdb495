"""The result of every method: a plain LoRA in PEFT's format, with its provenance."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .request import AdapterGenerationRequest


@dataclass(frozen=True, slots=True)
class GeneratedAdapter:
    """A plain PEFT LoRA, ready for the store."""

    config: dict[str, object]  # adapter_config.json
    tensors: dict[str, Tensor]  # adapter_model.safetensors, float32
    card: dict[str, object]  # provenance, JSON-ready
    system_prompt: str | None = None  # of chats that have none
    key: str = ""  # adapters with one key have the same config and tensors


class Generator(Protocol):
    """Makes an adapter from a sentence alone."""

    def generate(self, request: AdapterGenerationRequest) -> GeneratedAdapter:
        """Return an adapter: equal requests give equal bits. Any thread. Raises GeneratorError."""
