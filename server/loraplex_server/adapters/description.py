"""The descriptions of requests, as the resolver's hook wants them: a name and an explanation."""

from __future__ import annotations

from loraplex_adapter_store.selector import Description, NameRef

from .generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from .resolver import Resolution

__all__ = ["DescriptionGenerator"]

_SHOWN = ("method", "ood_score", "ood_limit", "parts", "delta_norm", "generator")


class DescriptionGenerator:
    """Implements ``AdapterGenerator`` of ``wish_resolver``. Called on a worker thread."""

    def __init__(self, adapters: GeneratedAdapters) -> None:
        self._adapters = adapters

    def generate(self, description: Description) -> Resolution:
        order = AdapterGenerationRequest(description.text, method=description.method)
        card = self._adapters.ensure(order)
        told = {key: card.provenance[key] for key in _SHOWN if key in card.provenance}
        ref = NameRef(card.name, card.digest[:12])
        return Resolution(ref, {"description": description.text, **told})
