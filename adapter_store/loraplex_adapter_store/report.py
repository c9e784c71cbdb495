"""The load report of an adapter: tensors, scales, and the effect on each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """A target module. ``delta_ratio`` is ‖ΔW‖/‖W‖ (Frobenius), None if it has no meaning."""

    rank: int
    delta_ratio: float | None


@dataclass(frozen=True, slots=True)
class LoadReport:
    family: str
    digest: str
    scale_rule: str  # as "alpha/r = 16/8 = 2 (factors folded)"
    matched: tuple[str, ...]  # every tensor of the file
    unexpected_keys: tuple[str, ...]  # always empty for a stored adapter
    modules: Mapping[str, ModuleReport]
    notes: tuple[str, ...] = ()  # for a careful reader
    n_bytes_file: int = 0
    n_bytes_plan: int = 0
    kept_energy: float | None = None  # of ‖ΔW‖², for compressed full fine-tunes
    base_declared: str | None = None  # base_model_name_or_path as written
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "n_matched": len(self.matched),
            **json_fields(self),
            "modules": {name: asdict(module) for name, module in self.modules.items()},
        }

    def summary(self) -> dict[str, JsonValue]:
        """Return ``to_json`` with counts in place of the names of tensors and modules."""
        ratios = [m.delta_ratio for m in self.modules.values() if m.delta_ratio is not None]
        whole = self.to_json()
        del whole["matched"], whole["modules"]
        return {
            **whole,
            "n_modules": len(self.modules),
            "delta_ratio": {"min": min(ratios), "max": max(ratios)} if ratios else None,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> LoadReport:
        """The inverse of ``to_json``. Raises KeyError or TypeError for anything else."""
        parts = {s.name: value[s.name] for s in fields(LoadReport) if s.name in value}
        for name in ("matched", "unexpected_keys", "notes", "warnings"):
            parts[name] = tuple(parts[name])
        parts["modules"] = {n: ModuleReport(**module) for n, module in parts["modules"].items()}
        return LoadReport(**parts)


def json_fields(value: Any) -> dict[str, JsonValue]:
    """Return the fields of a dataclass by name, with plain lists and dictionaries."""
    shown: dict[str, JsonValue] = {}
    for spec in fields(value):
        part = getattr(value, spec.name)
        if isinstance(part, tuple):
            part = list(part)
        shown[spec.name] = dict(part) if isinstance(part, Mapping) else part
    return shown
