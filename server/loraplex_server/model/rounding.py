"""The differences that rounding explains between two ways to compute the same states.

transformers' own forward runs again while each layer's output is disturbed by about the rounding
error of the dtype. How far that moves the states is the tolerance for another implementation.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_MARGIN = 4.0  # allowed difference, in differences of the disturbed rows
_DENSITY = 1 / 16  # share of elements that are disturbed, by a whole rounding step
_N_ROUNDINGS = {torch.float32: 64.0}  # rounding steps of a layer; 1 in shorter dtypes


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative size of the disturbance of a layer's output."""
    return _N_ROUNDINGS.get(dtype, 1.0) * float(torch.finfo(dtype).eps)


def tolerance_of(disturbed: Tensor, clean: Tensor, rounding: float) -> float:
    """Return the allowed relative difference of states, given both runs of transformers."""
    return _MARGIN * (rms(differences(disturbed, clean)) + rounding / 2)


def differences(found: Tensor, expected: Tensor) -> Tensor:
    """Return each row's difference relative to the size of the centred row; float32."""
    a, b = found.float(), expected.float()
    centred = b - b.mean(-1, keepdim=True)
    size = torch.linalg.vector_norm(centred, dim=-1).clamp_min(1e-30)
    relative: Tensor = torch.linalg.vector_norm(a - b, dim=-1) / size
    return relative.nan_to_num(torch.inf)


def rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


@contextlib.contextmanager
def watched(model: nn.Module, layer_names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fill the yielded dict with each layer's output [n_rows, hidden_size]."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            seen[name] = hidden.reshape(-1, hidden.shape[-1]).clone()

        return hook

    with contextlib.ExitStack() as stack:
        for name in layer_names:
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            stack.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def disturbed(model: nn.Module, layer_names: Sequence[str], rounding: float) -> Iterator[None]:
    """Change some elements of each layer's output by ± ``rounding``, relative to their value.

    Only the second half of the batch is changed, so the halves show how far rounding moves logits.
    """
    generator = torch.Generator().manual_seed(1)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        first = hidden.shape[0] // 2
        noise = torch.rand(hidden[first:].shape, generator=generator) / _DENSITY
        factor = torch.where(noise < 1, 1 + rounding * (noise - 0.5).sign(), 1.0).to(hidden)
        disturbed = torch.cat([hidden[:first], hidden[first:] * factor])
        return disturbed if isinstance(output, Tensor) else (disturbed, *output[1:])

    with contextlib.ExitStack() as stack:
        for name in layer_names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield
