"""Files beside an adapter that describe its vectors and classes.

modules.json, 1_Pooling/config.json   sentence-transformers: the pooling of hidden states
config.json                           transformers: the names of labels, the problem type
"""

from collections.abc import Mapping

from loraplex_adapter_store.errors import MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import PoolingMode, PoolingPlan

from .file_names import MODEL_CONFIG_FILE, MODULES_FILE, POOLING_FILE
from .safetensors_reader import parse_json, parse_json_object

# The switches of older versions of sentence-transformers.
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
    """Return the pooling of these files; None if they have none. Raises AdapterRefused.

    Vectors are normalised if there is no list of modules, or if it has a ``Normalize``.
    """
    if POOLING_FILE not in files:
        if MODULES_FILE in files:  # of a model with other pooling, or none
            _modules(files[MODULES_FILE], limits)
        return None
    config = parse_json_object(files[POOLING_FILE], POOLING_FILE, limits.max_config_bytes)
    modules = _modules(files[MODULES_FILE], limits) if MODULES_FILE in files else ("Normalize",)
    if config.get("include_prompt") is False:
        raise UnsupportedAdapter(
            f"{POOLING_FILE}: include_prompt is false, but requests do not mark their prompts; "
            "set it to true"
        )
    return PoolingPlan(_mode(config), normalize="Normalize" in modules)


def read_model_config(files: Mapping[str, bytes], limits: StoreLimits) -> Mapping[str, object]:
    """Return the fields of transformers' config.json, if there is one. Raises AdapterRefused."""
    if MODEL_CONFIG_FILE not in files:
        return {}
    return parse_json_object(files[MODEL_CONFIG_FILE], MODEL_CONFIG_FILE, limits.max_config_bytes)


def _mode(config: Mapping[str, object]) -> PoolingMode:
    named = config.get("pooling_mode")
    if named is None:
        modes = [mode for switch, mode in _SWITCHES.items() if config.get(switch) is True]
    else:
        words = [str(word) for word in named] if isinstance(named, list) else [str(named)]
        known = {mode.value: mode for mode in PoolingMode}
        if not all(word in known for word in words):
            raise UnsupportedAdapter(
                f"{POOLING_FILE}: pooling_mode is {named!r}; known: {', '.join(known)}"
            )
        modes = [known[word] for word in words]
    if len(modes) != 1:
        raise UnsupportedAdapter(
            f"{POOLING_FILE} asks for {len(modes)} modes of pooling "
            f"({', '.join(mode.value for mode in modes) or 'none'}); exactly one is served"
        )
    return modes[0]


def _modules(data: bytes, limits: StoreLimits) -> tuple[str, ...]:
    """Return the class names of the modules. Raises AdapterRefused for unsupported modules."""
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
