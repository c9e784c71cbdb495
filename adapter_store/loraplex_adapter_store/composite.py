"""Adapters built on request from several named ones: mixtures and libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .base_spec import BaseSpec
from .errors import InvalidSelector
from .library import GateOf, library_digest, library_plan
from .mixture import mix_plans, mixture_digest, outline_mixture
from .plan import AdapterPlan
from .selector import Library, Mixture, NameRef

__all__ = ["Composite"]


@dataclass(frozen=True, slots=True)
class Composite:
    label: str  # the selector in words
    refs: tuple[NameRef, ...]
    identify: Callable[[Sequence[str]], str]  # the parts' digests → the whole's
    build: Callable[[Sequence[AdapterPlan], str], AdapterPlan]  # the parts, the whole's digest
    # Of the same: shapes and bytes of what ``build`` makes. None: those of the parts together.
    outline: Callable[[Sequence[AdapterPlan], str], AdapterPlan] | None = None

    @staticmethod
    def of_mixture(mixture: Mixture, base: BaseSpec) -> Composite:
        """``build`` and ``outline`` raise InvalidSelector for parts that are not additive."""
        weights = [part.weight for part in mixture.parts]
        names = [part.ref.name for part in mixture.parts]

        def identify(digests: Sequence[str]) -> str:
            return mixture_digest(list(zip(digests, weights, strict=True)))

        def build(plans: Sequence[AdapterPlan], digest: str) -> AdapterPlan:
            return mix_plans(list(zip(plans, weights, strict=True)), base, digest, names=names)

        def outline(plans: Sequence[AdapterPlan], digest: str) -> AdapterPlan:
            return outline_mixture(plans, digest, names=names)

        refs = tuple(part.ref for part in mixture.parts)
        return Composite(str(mixture), refs, identify, build, outline)

    @staticmethod
    def of_library(library: Library, gate_of: GateOf | None) -> Composite:
        """Raises InvalidSelector without gates."""
        if gate_of is None:
            raise InvalidSelector("this store has no gates for libraries (arrow)")
        k, temperature, gate = library.top_k, library.temperature, gate_of
        names = [ref.name for ref in library.refs]

        def identify(digests: Sequence[str]) -> str:
            return library_digest(digests, k, temperature)

        def build(plans: Sequence[AdapterPlan], digest: str) -> AdapterPlan:
            return library_plan(plans, digest, k, temperature, gate, names=names)

        return Composite(str(library), tuple(library.refs), identify, build)
