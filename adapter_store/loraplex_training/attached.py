"""A frozen base with an adapter attached: what the training loop calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import TrainingError

__all__ = ["AdapterModules", "Attached", "fill", "save_adapter"]


class AdapterModules(Protocol):
    """An adapter whose modules sit inside a base (``MixLora``, ``BlockLora``)."""

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of the file format, nothing folded."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``. Raises ValueError if the names differ."""

    def adapter_config(self, base_model: str) -> dict[str, object]: ...

    def auxiliary_loss(self, token_mask: Tensor | None = None) -> Tensor:
        """Of the last forward; 0 for families without one."""


class Attached(nn.Module):
    """Calls the base, and remembers which tokens were padding, for the auxiliary loss.

    Exactly the adapter's parameters require gradients.
    """

    def __init__(self, base: nn.Module, adapter: AdapterModules) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self._token_mask: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.base.config

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, **inputs: Any) -> Any:
        """The base's own; with cached keys the mask is longer than the tokens that run now."""
        mask = inputs.get("attention_mask")
        n_tokens = inputs["input_ids"].shape[1]
        self._token_mask = None if mask is None else mask[:, -n_tokens:].reshape(-1).bool()
        return self.base(**inputs)

    def auxiliary_loss(self) -> Tensor:
        return self.adapter.auxiliary_loss(self._token_mask)


def fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies ``tensors`` into the parameters ``own``. Raises ValueError if the names differ."""
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())[:4]
        raise ValueError(f"tensors differ from this configuration, for example {differing}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def save_adapter(model: nn.Module, base_name: str, folder: Path, dtype: torch.dtype) -> None:
    """Writes adapter_config.json and adapter_model.safetensors. Raises TrainingError."""
    from safetensors.torch import save_file

    if not isinstance(model, Attached):
        raise TypeError(f"{type(model).__name__} carries no adapter of ours")
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.adapter.tensors().items()
    }
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TrainingError(f"{len(bad)} tensors are not finite as {dtype}, first {bad[0]}")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(model.adapter.adapter_config(base_name), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")
