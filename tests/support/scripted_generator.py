"""A generator of random LoRAs of a tiny base, seeded by the request."""

import hashlib

import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_generation.errors import OutOfDistribution, UnfitPrompts
from loraplex_generation.experts.icm_lora import MIN_PROMPTS
from loraplex_generation.generated import GeneratedAdapter
from loraplex_generation.request import AdapterGenerationRequest

_RANK = 2


class ScriptedGenerator:
    """A generator that refuses "strange" descriptions. ``n_made`` counts adapters."""

    def __init__(self, spec: BaseSpec) -> None:
        self._linears = {n: s for n, s in spec.modules.items() if n.endswith(("q_proj", "o_proj"))}
        self.n_made = 0

    def refuses(self, request: AdapterGenerationRequest) -> bool:
        return "strange" in request.description

    def generate(self, request: AdapterGenerationRequest) -> GeneratedAdapter:
        if self.refuses(request) and not request.force:
            raise OutOfDistribution(0.9, 0.5, [("card.de/plain", 0.1)])
        if 0 < len(request.prompts) < MIN_PROMPTS:
            raise UnfitPrompts(f"{len(request.prompts)} prompts")
        self.n_made += 1
        options = (request.method, request.seed, request.samples)
        text = f"{request.texts}{request.prompts}{options}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        random = torch.Generator().manual_seed(key)
        tensors = {}
        for name, shape in self._linears.items():
            stem = f"base_model.model.{name}.lora"
            tensors[f"{stem}_A.weight"] = torch.randn(_RANK, shape.in_features, generator=random)
            b = 0.2 * torch.randn(shape.out_features, _RANK, generator=random)
            tensors[f"{stem}_B.weight"] = b
        config: dict[str, object] = {
            "peft_type": "LORA",
            "r": _RANK,
            "lora_alpha": 2 * _RANK,
            "target_modules": ["q_proj", "o_proj"],
            "base_model_name_or_path": "tiny/llama",
        }
        card: dict[str, object] = {"method": "scripted", "parts": {"fr": 1.0}}
        return GeneratedAdapter(config, tensors, card)
