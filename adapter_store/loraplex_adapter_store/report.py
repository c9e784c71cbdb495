"""The load report: what was read, how it was scaled, what it does to each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["JsonValue", "LoadReport", "ModuleReport"]

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One target module. ``delta_ratio`` is ‖ΔW‖/‖W‖ (Frobenius), None where it has no meaning."""

    rank: int
    delta_ratio: float | None


@dataclass(frozen=True, slots=True)
class LoadReport:
    family: str
    digest: str
    scale_rule: str  # as "alpha/r = 16/8 = 2 (factors folded)"
    matched: tuple[str, ...]  # every tensor of the file, all accounted for
    unexpected_keys: tuple[str, ...]  # always empty for a stored adapter
    modules: Mapping[str, ModuleReport]
    notes: tuple[str, ...] = ()  # everything a careful reader should know
    n_bytes_file: int = 0
    n_bytes_plan: int = 0
    kept_energy: float | None = None  # of ‖ΔW‖², for compressed full fine-tunes
    base_declared: str | None = None  # base_model_name_or_path as written
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "family": self.family,
            "digest": self.digest,
            "scale_rule": self.scale_rule,
            "n_matched": len(self.matched),
            "matched": list(self.matched),
            "unexpected_keys": list(self.unexpected_keys),
            "modules": {
                name: {"rank": module.rank, "delta_ratio": module.delta_ratio}
                for name, module in self.modules.items()
            },
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "n_bytes_file": self.n_bytes_file,
            "n_bytes_plan": self.n_bytes_plan,
            "kept_energy": self.kept_energy,
            "base_declared": self.base_declared,
        }

    def summary(self) -> dict[str, JsonValue]:
        """``to_json`` with numbers in place of the names of tensors and modules."""
        ratios = [m.delta_ratio for m in self.modules.values() if m.delta_ratio is not None]
        whole = self.to_json()
        del whole["matched"], whole["modules"]
        return {
            **whole,
            "n_modules": len(self.modules),
            "delta_ratio": {"min": min(ratios), "max": max(ratios)} if ratios else None,
        }

    @staticmethod
    def from_json(value: Mapping[str, JsonValue]) -> LoadReport:
        """The inverse of ``to_json``; used when the registry is opened."""
        modules = value["modules"]
        assert isinstance(modules, dict)
        energy, declared = value.get("kept_energy"), value.get("base_declared")
        return LoadReport(
            family=str(value["family"]),
            digest=str(value["digest"]),
            scale_rule=str(value["scale_rule"]),
            matched=_strings(value["matched"]),
            unexpected_keys=_strings(value["unexpected_keys"]),
            modules={name: _module(module) for name, module in modules.items()},
            notes=_strings(value["notes"]),
            warnings=_strings(value["warnings"]),
            n_bytes_file=_integer(value["n_bytes_file"]),
            n_bytes_plan=_integer(value["n_bytes_plan"]),
            kept_energy=float(energy) if isinstance(energy, int | float) else None,
            base_declared=declared if isinstance(declared, str) else None,
        )


def _module(value: JsonValue) -> ModuleReport:
    assert isinstance(value, dict)
    ratio = value["delta_ratio"]
    return ModuleReport(
        _integer(value["rank"]), float(ratio) if isinstance(ratio, int | float) else None
    )


def _strings(value: JsonValue) -> tuple[str, ...]:
    assert isinstance(value, list)
    return tuple(str(item) for item in value)


def _integer(value: JsonValue) -> int:
    assert isinstance(value, int)
    return value
