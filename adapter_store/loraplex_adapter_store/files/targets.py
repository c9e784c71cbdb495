"""Names of modules: what a config targets, by PEFT's matching rules, and trainers' spellings."""

import functools
import re
from collections.abc import Container, Iterable

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import MalformedFile

from .adapter_config import AdapterConfig

# The names of the trunk in a model with a head: the same adapter may be saved with or without them.
_TRUNKS = ("model.", "bert.", "roberta.", "distilbert.", "vit.", "dinov2.")
# Prefixes of wrappers, which are stripped from the left.
_WRAPPERS = (
    *("base_model.model.", "base_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module."),
    *("mola.", "loramoe."),  # MoE-PEFT
    *("language_model.", "text_model."),  # the language model of a multimodal model
)
# Parts of names of LLaVA and Qwen-VL in transformers 4 → the same in transformers 5.
_RENAMED = (
    ("language_model.model.", "language_model."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.layers.", "model.language_model.layers."),
)


def expand_targets(config: AdapterConfig, base: BaseSpec) -> frozenset[str]:
    """Return the names of the base's linears and embeddings that ``config`` targets."""
    return targets_among(config, base, (*base.modules, *base.embeddings))


def targets_among(config: AdapterConfig, base: BaseSpec, names: Iterable[str]) -> frozenset[str]:
    """Return the modules among ``names`` that ``config`` targets."""
    targets = frozenset(name for name in names if _is_target(config, base, name))
    if ties_head(config, base) and base.input_embedding in targets:
        return targets | {base.output_head}
    return targets


def ties_head(config: AdapterConfig, base: BaseSpec) -> bool:
    """True if ``ensure_weight_tying`` applies changes of the embedding to a tied head."""
    return config.flag("ensure_weight_tying") and base.tie_word_embeddings


def pattern_value(config: AdapterConfig, key: str, module: str, default: float) -> float:
    """Return the value of the first pattern that matches the last segments of ``module``."""
    for pattern, value in config.pattern(key).items():
        if config.regex.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def is_feedforward(config: AdapterConfig, module: str) -> bool:
    """True if IA³'s ``feedforward_modules``, a regex or suffixes, includes ``module``."""
    names = config.names("feedforward_modules")
    if isinstance(names, str):
        return config.regex.match(rf"(?:{names})\Z", module) is not None
    return names is not None and (module in names or _ends_with_any(module, names))


def is_saved(config: AdapterConfig, module: str) -> bool:
    """True if ``modules_to_save`` replaces the whole module."""
    saved = config.name_list("modules_to_save")
    return any(config.regex.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)


def layer_index(module: str) -> int | None:
    """Return the first number in a module path: 3 for "model.layers.3.mlp"."""
    match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", f"x.{module}.")
    return None if match is None else int(match["index"])


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
    wanted, patterns = config.get("layers_to_transform"), config.name_list("layers_pattern")
    if wanted is None or wanted == []:
        return True
    layers = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise MalformedFile("adapter_config.json: layers_to_transform needs integers")
    if not any(patterns):
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        return match is not None and int(match["index"]) in layers
    for pattern in patterns:
        layer = config.regex.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", name)
        if layer is not None:
            return int(layer["index"]) in layers
    return False


def module_names(base: BaseSpec) -> frozenset[str]:
    """Return every module of the base that has parameters."""
    parents = (name.rpartition(".")[0] for name in base.parameters)
    return frozenset((*base.modules, *base.embeddings, *parents))


def resolve_module(path: str, names: Container[str]) -> str | None:
    """Return the name that ``path`` means without wrappers' prefixes, or None."""
    # The first two candidates, without the time to make the others.
    for name in (path, path.removeprefix(_WRAPPERS[0])):
        if name in names:
            return name
    return next((name for name in _candidates(path) if name in names), None)


def split_key(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """Split "…q_proj.lora_A[.default].weight" into ("…q_proj", "lora_A.weight"), or None.

    A suffix that begins with "_" follows the module's name without a dot.
    """
    for suffix in suffixes:
        for spelled in _spellings(suffix):
            end = spelled if spelled.startswith("_") else f".{spelled}"
            if key.endswith(end):
                return key.removesuffix(end), suffix
    return None


def group_by_module(
    keys: Iterable[str], suffixes: Iterable[str], base: BaseSpec
) -> dict[str, dict[str, str]]:
    """Return module → suffix → key, without keys of unknown suffixes or modules."""
    known = sorted(suffixes, key=len, reverse=True)
    names = module_names(base)
    grouped: dict[str, dict[str, str]] = {}
    resolved: dict[str, str | None] = {}  # a module has several keys
    for key in keys:
        split = split_key(key, known)
        if split is None:
            continue
        path, suffix = split
        if path not in resolved:
            resolved[path] = resolve_module(path, names)
        module = resolved[path]
        if module is not None:
            grouped.setdefault(module, {}).setdefault(suffix, key)
    return grouped


def _candidates(path: str) -> list[str]:
    names = [path]
    for wrapper in (*_WRAPPERS, "model.", *_WRAPPERS):
        names += [name.removeprefix(wrapper) for name in names if name.startswith(wrapper)]
    for earlier, now in _RENAMED:
        names += [name.replace(earlier, now, 1) for name in names if earlier in name]
    longer = [f"{trunk}{name}" for trunk in _TRUNKS for name in names]
    shorter = [name.removeprefix("model.") for name in names if name.startswith("model.")]
    return list(dict.fromkeys([*names, *longer, *shorter]))


@functools.lru_cache(maxsize=256)
def _spellings(suffix: str) -> tuple[str, ...]:
    head, dot, leaf = suffix.partition(".")
    return suffix, (f"{head}.default.{leaf}" if dot else f"{head}.default")
