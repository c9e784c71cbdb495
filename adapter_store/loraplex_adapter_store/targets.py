"""Which base modules a config targets, by PEFT's own matching rules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .adapter_config import AdapterConfig
from .base_spec import BaseSpec
from .errors import MalformedFile

__all__ = ["expand_targets", "layer_index", "module_in", "pattern_value"]

_MAX_PATTERN = 2000


def expand_targets(config: AdapterConfig, base: BaseSpec) -> frozenset[str]:
    """Names of the base's linears and embeddings that ``config`` targets."""
    names = (*base.modules, *base.embeddings)
    return frozenset(name for name in names if _is_target(config, base, name))


def pattern_value(config: AdapterConfig, key: str, module: str, default: float) -> float:
    """rank_pattern/alpha_pattern: the first key that matches whole last segments of ``module``."""
    for pattern, value in config.pattern(key).items():
        if _match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def module_in(names: tuple[str, ...] | str | None, module: str) -> bool:
    """PEFT's rule for lists of modules: a regex, or names that end the path."""
    if isinstance(names, str):
        return _match(rf"(?:{names})\Z", module)
    return names is not None and (module in names or _ends_with_any(module, names))


def layer_index(module: str) -> int | None:
    """The first numbered segment after a named one: 3 of "model.layers.3.mlp"."""
    found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", f"x.{module}.")
    return None if found is None else int(found["index"])


def _is_target(config: AdapterConfig, base: BaseSpec, name: str) -> bool:
    if _is_excluded(config, name):
        return False
    targets = config.names("target_modules")
    if targets is None:
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return name in base.modules and name != base.output_head
        return _match(rf"(?:{targets})\Z", name)
    if name in targets:
        return True
    return _ends_with_any(name, targets) and _in_layers(config, name)


def _is_excluded(config: AdapterConfig, name: str) -> bool:
    excluded = config.names("exclude_modules")
    if isinstance(excluded, str) and excluded:
        if _match(rf"(?:{excluded})\Z", name):
            return True
    elif excluded and (name in excluded or _ends_with_any(name, excluded)):
        return True
    saved = config.names("modules_to_save") or ()
    saved = (saved,) if isinstance(saved, str) else saved
    return any(_match(rf"(^|.*\.){item}($|\..*)", name) for item in saved)


def _ends_with_any(name: str, suffixes: Iterable[str]) -> bool:
    return any(name.endswith(f".{suffix}") for suffix in suffixes)


def _in_layers(config: AdapterConfig, name: str) -> bool:
    wanted = config.values.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    layers = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise MalformedFile("adapter_config.json: layers_to_transform needs integers")
    patterns = config.names("layers_pattern")
    patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
    found: re.Match[str] | None = None
    if not any(patterns):
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    for pattern in patterns:
        found = found or re.match(rf"(?:^|.*?\.){_safe(pattern)}\.(?P<index>\d+)\.", name)
    return found is not None and int(found["index"]) in layers


def _match(pattern: str, name: str) -> bool:
    try:
        return re.match(_safe(pattern), name) is not None
    except re.error as error:
        raise MalformedFile(f"adapter_config.json: bad pattern {pattern!r}: {error}") from None


def _safe(pattern: str) -> str:
    """Bounds what an uploaded regular expression can cost: length, and no nested quantifiers."""
    if len(pattern) > _MAX_PATTERN or re.search(
        r"[+*}]\)*[+*{]|\([^()]*[+*][^()]*\)[+*{]", pattern
    ):
        raise MalformedFile(
            f"adapter_config.json: pattern {pattern[:80]!r} is too complex to match"
        )
    return pattern
