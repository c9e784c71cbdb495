"""Which base modules a config targets, by PEFT's own matching rules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .adapter_config import AdapterConfig
from .base_spec import BaseSpec
from .errors import MalformedFile

__all__ = [
    "expand_targets",
    "is_feedforward",
    "is_saved",
    "layer_index",
    "pattern_value",
    "targets_among",
    "ties_head",
]


def expand_targets(config: AdapterConfig, base: BaseSpec) -> frozenset[str]:
    """Names of the base's linears and embeddings that ``config`` targets."""
    return targets_among(config, base, (*base.modules, *base.embeddings))


def targets_among(config: AdapterConfig, base: BaseSpec, names: Iterable[str]) -> frozenset[str]:
    """Those of the base's modules ``names`` that ``config`` targets."""
    found = frozenset(name for name in names if _is_target(config, base, name))
    if ties_head(config, base) and base.input_embedding in found:
        return found | {base.output_head}
    return found


def ties_head(config: AdapterConfig, base: BaseSpec) -> bool:
    """``ensure_weight_tying``: what is done to the embedding is done to a tied head, too."""
    return config.flag("ensure_weight_tying") and base.tie_word_embeddings


def pattern_value(config: AdapterConfig, key: str, module: str, default: float) -> float:
    """rank_pattern/alpha_pattern: the first key that matches whole last segments of ``module``."""
    for pattern, value in config.pattern(key).items():
        if config.regex.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def is_feedforward(config: AdapterConfig, module: str) -> bool:
    """IA³'s ``feedforward_modules``: a regex, or names that end the path."""
    names = config.names("feedforward_modules")
    if isinstance(names, str):
        return config.regex.match(rf"(?:{names})\Z", module) is not None
    return names is not None and (module in names or _ends_with_any(module, names))


def is_saved(config: AdapterConfig, module: str) -> bool:
    """``modules_to_save`` replaces the whole module."""
    saved = config.names("modules_to_save") or ()
    saved = (saved,) if isinstance(saved, str) else saved
    return any(config.regex.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)


def layer_index(module: str) -> int | None:
    """The first numbered segment after a named one: 3 of "model.layers.3.mlp"."""
    found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", f"x.{module}.")
    return None if found is None else int(found["index"])


def _is_target(config: AdapterConfig, base: BaseSpec, name: str) -> bool:
    if _is_excluded(config, name) or is_saved(config, name):
        return False
    targets = config.names("target_modules")
    if targets is None:
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return name in base.modules and name != base.output_head
        return config.regex.match(rf"(?:{targets})\Z", name) is not None
    if name in targets:
        return True
    return _ends_with_any(name, targets) and _in_layers(config, name)


def _is_excluded(config: AdapterConfig, name: str) -> bool:
    excluded = config.names("exclude_modules")
    if isinstance(excluded, str) and excluded:
        return config.regex.match(rf"(?:{excluded})\Z", name) is not None
    excluded = excluded or ()
    return name in excluded or _ends_with_any(name, excluded)


def _ends_with_any(name: str, suffixes: Iterable[str]) -> bool:
    return any(name.endswith(f".{suffix}") for suffix in suffixes)


def _in_layers(config: AdapterConfig, name: str) -> bool:
    wanted, patterns = config.get("layers_to_transform"), config.names("layers_pattern")
    if wanted is None or wanted == []:
        return True
    layers = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise MalformedFile("adapter_config.json: layers_to_transform needs integers")
    patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
    if not any(patterns):
        return (found := re.match(r".*?\.[^.]*\.(\d+)\.", name)) is not None and (
            int(found[1]) in layers
        )
    for pattern in patterns:
        match = config.regex.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", name)
        if match is not None:
            return int(match["index"]) in layers
    return False
