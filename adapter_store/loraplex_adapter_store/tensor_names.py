"""From tensor names, as dozens of trainers write them, to modules of the base."""

from __future__ import annotations

from collections.abc import Container, Iterable

from .base_spec import BaseSpec

__all__ = ["group_by_module", "module_names", "resolve_module", "split_key"]

# Wrappers that trainers leave in front of the base model's own names, stripped from the left.
_WRAPPERS = (
    *("base_model.model.", "base_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module."),
    *("mola.", "loramoe."),  # MoE-PEFT
)


def module_names(base: BaseSpec) -> frozenset[str]:
    """Every module of the base that holds parameters."""
    parents = (name.rpartition(".")[0] for name in base.parameters)
    return frozenset((*base.modules, *base.embeddings, *parents))


def resolve_module(path: str, names: Container[str]) -> str | None:
    """The one of ``names`` that ``path`` means once wrappers' prefixes are gone, or None."""
    return next((name for name in _candidates(path) if name in names), None)


def split_key(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """("…q_proj", "lora_A.weight"), also of "…q_proj.lora_A.default.weight"; None if no suffix."""
    for suffix in suffixes:
        for spelled in _spellings(suffix):
            if key.endswith(f".{spelled}"):
                return key[: -len(spelled) - 1], suffix
    return None


def group_by_module(
    keys: Iterable[str], suffixes: Iterable[str], base: BaseSpec
) -> dict[str, dict[str, str]]:
    """module → suffix → key. Keys without a known suffix or module are left out."""
    known = sorted(suffixes, key=len, reverse=True)
    names = module_names(base)
    grouped: dict[str, dict[str, str]] = {}
    for key in keys:
        split = split_key(key, known)
        module = None if split is None else resolve_module(split[0], names)
        if split is not None and module is not None:
            grouped.setdefault(module, {}).setdefault(split[1], key)
    return grouped


def _candidates(path: str) -> list[str]:
    found = [path]
    for wrapper in (*_WRAPPERS, *_WRAPPERS):
        found += [name.removeprefix(wrapper) for name in found if name.startswith(wrapper)]
    found += [f"model.{name}" for name in found] + [
        name.removeprefix("model.") for name in found if name.startswith("model.")
    ]
    return list(dict.fromkeys(found))


def _spellings(suffix: str) -> tuple[str, ...]:
    head, dot, leaf = suffix.partition(".")
    return suffix, (f"{head}.default.{leaf}" if dot else f"{head}.default")
