"""A Generator without a trained bundle: random LoRAs of a tiny base, seeded by the order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_generation.errors import OutOfDistribution, UnfitPrompts
from loraplex_generation.layout import AdapterLayout, BaseShape
from loraplex_generation.library import Subspace
from loraplex_generation.sentences import Encoded
from loraplex_generation.service import AdapterDescription, Draft, GeneratedAdapter, Generator
from loraplex_generation.task_vectors import MIN_PROMPTS

__all__ = ["ScriptedGenerator"]


class ScriptedGenerator(Generator):
    """A description with "strange" in it is out of distribution. `n_made` counts adapters."""

    def __init__(self, spec: BaseSpec) -> None:
        shape = BaseShape(
            spec.n_layers, spec.hidden_size, spec.n_heads, spec.n_kv_heads, spec.head_dim
        )
        self._layout = AdapterLayout(shape, first_layer=0, rank=2, alpha=4.0, seed=0)
        random = torch.Generator().manual_seed(7)
        self._span = Subspace.of(0.02 * torch.randn(5, self._layout.size, generator=random))
        self.n_made = 0

    @property
    def span(self) -> Subspace:
        return self._span

    def library_mean(self) -> Tensor:
        return self._span.mean

    def readings(self, asked: AdapterDescription, method: str) -> dict[str, Draft]:
        return {}

    def read(
        self, description: str, wordings: Sequence[str] = (), prompts: Sequence[str] = ()
    ) -> AdapterDescription:
        nothing = torch.zeros(1, 1)
        encoded = Encoded(nothing, nothing.bool(), nothing)
        return AdapterDescription((description, *wordings), tuple(prompts), encoded)

    def refuses(self, asked: AdapterDescription, method: str = "auto") -> bool:
        return "strange" in asked.wordings[0]

    def dressed(self, vector: Tensor, card: dict[str, object]) -> GeneratedAdapter:
        config, tensors = self._layout.peft(vector, "tiny/llama")
        return GeneratedAdapter(config, tensors, card, self._layout, vector)

    def generate(
        self,
        description: str,
        *,
        wordings: Sequence[str] = (),
        prompts: Sequence[str] = (),
        method: str = "auto",
        seed: int = 0,
        force: bool = False,
        samples: int = 0,
    ) -> GeneratedAdapter:
        if "strange" in description and not force:
            raise OutOfDistribution(0.9, 0.5, [("card.de/plain", 0.1)])
        if 0 < len(prompts) < MIN_PROMPTS:
            raise UnfitPrompts(f"{len(prompts)} prompts")
        self.n_made += 1
        text = f"{description}{list(wordings)}{list(prompts)}{method}{seed}{samples}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        random = torch.Generator().manual_seed(key)
        vector = 0.2 * torch.randn(self._layout.size, generator=random)
        card: dict[str, object] = {
            "method": "scripted",
            "ood_score": 0.1,
            "ood_limit": 0.5,
            "parts": {"fr": 1.0},
            "delta_norm": 1.0,
            "generator": "00",
        }
        return self.dressed(vector, card)
