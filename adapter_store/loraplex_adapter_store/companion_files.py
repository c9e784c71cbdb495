"""Files beside an adapter that say how its vectors and classes are to be read.

modules.json, 1_Pooling/config.json   sentence-transformers: how hidden states are pooled
config.json                           transformers: the names of labels, the kind of problem
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import MalformedFile, UnsupportedAdapter
from .limits import StoreLimits
from .plan import PoolingMode, PoolingPlan
from .safetensors_reader import parse_json, parse_json_object

__all__ = [
    "COMPANION_FILES",
    "MODEL_CONFIG_FILE",
    "MODULES_FILE",
    "POOLING_FILE",
    "read_model_config",
    "read_pooling",
]

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
MODEL_CONFIG_FILE = "config.json"
COMPANION_FILES = (MODULES_FILE, POOLING_FILE, MODEL_CONFIG_FILE)

# What older versions of sentence-transformers call the modes: one switch each.
_SWITCHES = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_lasttoken": PoolingMode.LAST,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_max_tokens": PoolingMode.MAX,
}
_KNOWN_MODULES = frozenset({"Transformer", "Pooling", "Normalize"})


def read_pooling(files: Mapping[str, bytes], limits: StoreLimits) -> PoolingPlan | None:
    """What these files say; None if they say nothing. Raises AdapterRefused.

    Without a list of modules vectors are normalised; with one, if it has a ``Normalize``.
    """
    if POOLING_FILE not in files:
        if MODULES_FILE in files:  # of a model that pools otherwise, or not at all
            _modules(files[MODULES_FILE], limits)
        return None
    config = parse_json_object(files[POOLING_FILE], POOLING_FILE, limits.max_config_bytes)
    modules = _modules(files[MODULES_FILE], limits) if MODULES_FILE in files else ("Normalize",)
    if config.get("include_prompt") is False:
        raise UnsupportedAdapter(
            f"{POOLING_FILE}: include_prompt is false, but prompts of inputs are not known here; "
            "set it to true"
        )
    return PoolingPlan(_mode(config), normalize="Normalize" in modules)


def read_model_config(files: Mapping[str, bytes], limits: StoreLimits) -> Mapping[str, object]:
    """The fields of transformers' config.json; none without the file. Raises AdapterRefused."""
    if MODEL_CONFIG_FILE not in files:
        return {}
    return parse_json_object(files[MODEL_CONFIG_FILE], MODEL_CONFIG_FILE, limits.max_config_bytes)


def _mode(config: Mapping[str, object]) -> PoolingMode:
    named = config.get("pooling_mode")
    if named is None:
        found = [mode for switch, mode in _SWITCHES.items() if config.get(switch) is True]
    else:
        words = [str(word) for word in named] if isinstance(named, list) else [str(named)]
        known = {mode.value: mode for mode in PoolingMode}
        if not all(word in known for word in words):
            raise UnsupportedAdapter(
                f"{POOLING_FILE}: pooling_mode is {named!r}; known: {', '.join(known)}"
            )
        found = [known[word] for word in words]
    if len(found) != 1:
        raise UnsupportedAdapter(
            f"{POOLING_FILE} asks for {len(found)} modes of pooling "
            f"({', '.join(mode.value for mode in found) or 'none'}); exactly one is served"
        )
    return found[0]


def _modules(data: bytes, limits: StoreLimits) -> tuple[str, ...]:
    """The last words of the modules' types. Raises AdapterRefused for those that do more."""
    listed = parse_json(data, MODULES_FILE, limits.max_config_bytes)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise MalformedFile(f"{MODULES_FILE} is not a list of modules")
    names = tuple(str(one.get("type")).rpartition(".")[2] for one in listed)
    unknown = [name for name in names if name not in _KNOWN_MODULES]
    if unknown:
        raise UnsupportedAdapter(
            f"{MODULES_FILE} lists a module of type {unknown[0]!r} after the transformer; served "
            "are Pooling and Normalize"
        )
    return names
