"""Groups the linears of an architecture that share an input and are packed as one product."""

from collections.abc import Iterable, Mapping

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BERT_QKV = ("self.query", "self.key", "self.value")
_VIT_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Model type → suffixes of linears that share an input, in the order of their calls.
PACKED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "llama": (_QKV, _GATE_UP),
    "mistral": (_QKV, _GATE_UP),
    "qwen2": (_QKV, _GATE_UP),
    "qwen3": (_QKV, _GATE_UP),
    "qwen2_5_vl_text": (_QKV, _GATE_UP),
    "qwen2_vl_text": (_QKV, _GATE_UP),
    "gemma": (_QKV, _GATE_UP),
    "gemma2": (_QKV, _GATE_UP),
    "gemma3_text": (_QKV, _GATE_UP),
    "bert": (_BERT_QKV,),
    "roberta": (_BERT_QKV,),
    "xlm-roberta": (_BERT_QKV,),
    "distilbert": (("attention.q_lin", "attention.k_lin", "attention.v_lin"),),
    "vit": (_VIT_QKV,),
    "dinov2": (_VIT_QKV, _GATE_UP),
    "clip": (_QKV,),
    "siglip": (_QKV,),
    "gpt2": (),
    "phi3": (),
}


def group_modules(model_type: str, linear_names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return every linear once, in groups if the architecture is known, else alone."""
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
    """Return the sites that may have experts: linears, and MLP blocks with packed gate and up.

    The result includes the head if ``linear_names`` does.
    """
    groups = group_modules(model_type, linear_names)
    linears = frozenset(name for group in groups for name in group)
    mlps = {
        group[0].removesuffix(".gate_proj")
        for group in groups
        if len(group) == 2 and group[0].endswith(".gate_proj")
    }
    return linears | {mlp for mlp in mlps if f"{mlp}.down_proj" in linears}
