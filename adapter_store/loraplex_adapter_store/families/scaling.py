"""The scale of a LoRA: alpha/r, or alpha/√r (rsLoRA), with PEFT's per-module patterns."""

import math
from typing import NamedTuple

from loraplex_adapter_store.errors import MalformedFile
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.targets import pattern_value


class LoraScale(NamedTuple):
    rank: int  # the training-time rank of the module
    scale: float  # multiplies B A


def lora_scale(config: AdapterConfig, module: str) -> LoraScale:
    return pattern_scale(config, module, "lora_alpha")


def pattern_scale(config: AdapterConfig, module: str, alpha_key: str) -> LoraScale:
    """Return the scale of a module. ``alpha_key`` is the config field of the method's alpha."""
    rank = pattern_value(config, "rank_pattern", module, config.integer("r", 8))
    alpha = pattern_value(config, "alpha_pattern", module, config.number(alpha_key, 8))
    if not math.isfinite(rank) or rank != int(rank) or rank < 1:
        raise MalformedFile(f"adapter_config.json: rank {rank!r} of {module} is not a positive int")
    scale = alpha / (math.sqrt(rank) if config.flag("use_rslora") else rank)
    if not math.isfinite(scale):
        raise MalformedFile(f"adapter_config.json: lora_alpha {alpha!r} gives no finite scale")
    return LoraScale(int(rank), scale)


def positive_rank(config: AdapterConfig, default: int, *, key: str = "r") -> int:
    """Return the config's rank of modules that no pattern matches. Raises MalformedFile."""
    rank = config.integer(key, default)
    if rank < 1:
        raise MalformedFile(f"adapter_config.json: {key} is {rank}, a positive integer is needed")
    return rank


def scale_rule(config: AdapterConfig) -> str:
    """Return the scale in words, as "alpha/√r = 16/√64 = 2, rank_pattern of 3"."""
    rank, alpha = positive_rank(config, 8), config.number("lora_alpha", 8)
    root = "√" if config.flag("use_rslora") else ""
    scale = alpha / (math.sqrt(rank) if root else rank)
    rule = f"alpha/{root}r = {alpha:g}/{root}{rank} = {scale:g}"
    for key in ("rank_pattern", "alpha_pattern"):
        if config.pattern(key):
            rule += f", {key} of {len(config.pattern(key))}"
    return rule
