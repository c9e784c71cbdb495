"""The same plan, or part of one, with other tensors in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

__all__ = ["copied", "map_tensors"]

_T = TypeVar("_T")


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """``value`` with every tensor in it changed, once however many places share it."""
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
    """With tensors of its own: views of a plan's file would keep all of it in memory."""
    return map_tensors(value, torch.clone)
