"""Which linears of an architecture read the same input and are computed as one product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["PACKED", "group_modules", "routable_modules"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# model type → suffixes of a decoder layer that share their input, in the order they are called
PACKED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "llama": (_QKV, _GATE_UP),
    "mistral": (_QKV, _GATE_UP),
    "qwen2": (_QKV, _GATE_UP),
    "qwen3": (_QKV, _GATE_UP),
    "gemma": (_QKV, _GATE_UP),
    "gemma2": (_QKV, _GATE_UP),
    "gemma3_text": (_QKV, _GATE_UP),
    "gpt2": (),
    "phi3": (),
}


def group_modules(model_type: str, linear_names: Iterable[str]) -> list[tuple[str, ...]]:
    """Every linear once, in packed groups where the architecture is known, else alone."""
    names = list(linear_names)
    known = set(names)
    grouped: dict[str, tuple[str, ...]] = {}
    for suffixes in PACKED.get(model_type, ()):
        for name in names:
            if name.endswith("." + suffixes[0]):
                prefix = name[: -len(suffixes[0])]
                group = tuple(prefix + suffix for suffix in suffixes)
                if known.issuperset(group):
                    grouped.update(dict.fromkeys(group, group))
    return list(dict.fromkeys(grouped.get(name, (name,)) for name in names))


def routable_modules(model_type: str, linear_names: Iterable[str]) -> frozenset[str]:
    """Where an adapter may place experts: each linear, and each MLP block with packed gate and up.

    The head is among the linears given and therefore in the result; the caller leaves it out.
    """
    groups = group_modules(model_type, linear_names)
    linears = frozenset(name for group in groups for name in group)
    mlps = {
        group[0].removesuffix(".gate_proj")
        for group in groups
        if len(group) == 2 and group[0].endswith(".gate_proj")
    }
    return linears | {mlp for mlp in mlps if f"{mlp}.down_proj" in linears}
