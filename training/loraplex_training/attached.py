"""A frozen base with an adapter attached: the model that the training loop calls."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class AdapterModules(ABC):
    """An adapter whose modules sit inside a base (``MixLora``, ``BlockLora``)."""

    @abstractmethod
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by the names of the file format, with no scale folded in."""

    @abstractmethod
    def adapter_config(self, base_model: str) -> dict[str, object]: ...

    def auxiliary_loss(self, token_mask: Tensor | None) -> Tensor:
        """Return the auxiliary loss of the last forward; 0 for families without such a loss."""
        return torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.named_tensors()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the adapter. Raises ValueError if the names differ."""
        own = dict(self.named_tensors())
        if own.keys() != tensors.keys():
            differing = sorted(own.keys() ^ tensors.keys())[:4]
            raise ValueError(f"tensors differ from this configuration, for example {differing}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class Attached(nn.Module):
    """Calls the base, and notes which tokens are padding, for the auxiliary loss.

    Exactly the adapter's parameters require gradients.
    """

    def __init__(self, base: nn.Module, put_in: Callable[[nn.Module], AdapterModules]) -> None:
        """Freeze ``base``, and let ``put_in`` replace modules of it by those of a new adapter."""
        super().__init__()
        base.requires_grad_(False)
        self.adapter = put_in(base)
        self.base = base.to(next(base.parameters()).device)
        self._token_mask: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.base.config

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, **inputs: Any) -> Any:
        """Run the base. With cached keys the mask is longer than the tokens of this call."""
        mask = inputs.get("attention_mask")
        n_tokens = inputs["input_ids"].shape[1]
        self._token_mask = None if mask is None else mask[:, -n_tokens:].reshape(-1).bool()
        return self.base(**inputs)

    def auxiliary_loss(self) -> Tensor:
        return self.adapter.auxiliary_loss(self._token_mask)
