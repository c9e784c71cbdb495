"""The base's weights in a gateway: read from its files, and only when an adapter asks for them.

A spec reads weights through functions that hold the engine's memory. It leaves the engine replica
without them, and the gateway puts its own in their place: most families never look at a weight.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from transformers import AutoModelForCausalLM

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.model.loader import Lazy

__all__ = ["with_weights_of", "without_weights"]


def without_weights(base: BaseSpec) -> BaseSpec:
    """What may cross processes."""
    return replace(
        base, weight=_elsewhere, stored=_elsewhere, bias=_elsewhere, parameter=_elsewhere
    )


def with_weights_of(base: BaseSpec, path: Path, dtype: torch.dtype) -> BaseSpec:
    """``path``: of the base. ``dtype``: the engine's, so that what is computed is equal."""

    def load() -> BaseSpec:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        return BaseSpec.of(model, base.model_id)

    read = Lazy(load)
    return replace(
        base,
        weight=lambda name: read.get().weight(name),
        stored=lambda name: read.get().stored(name),
        bias=lambda name: read.get().bias(name),
        parameter=lambda name: read.get().parameter(name),
    )


def _elsewhere(name: str) -> NoReturn:
    raise AssertionError(f"the weights of {name} are in another process")
