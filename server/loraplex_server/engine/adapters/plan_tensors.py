"""Replaces the tensors of a plan or of a part of a plan."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

_T = TypeVar("_T")


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """Return ``value`` with every tensor changed; shared tensors are changed once."""
    changed: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def visit(part: object) -> object:
        if isinstance(part, Tensor):
            key = (part.data_ptr(), tuple(part.shape), part.stride())
            if key not in changed:
                changed[key] = change(part)
            return changed[key]
        if isinstance(part, Mapping):
            return {key: visit(item) for key, item in part.items()}
        if isinstance(part, tuple):
            return tuple(visit(item) for item in part)
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{f.name: visit(getattr(part, f.name)) for f in fields(part)})
        return part

    return cast(_T, visit(value))


def copied(value: _T) -> _T:
    """Return ``value`` with copied tensors. Views would keep a plan's whole file in memory."""
    return map_tensors(value, torch.clone)
