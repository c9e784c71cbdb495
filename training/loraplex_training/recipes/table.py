"""The table of recipes."""

from collections.abc import Mapping

from . import (
    allora,
    ba_lora,
    comp_lora,
    core,
    flexora,
    ggpo,
    glad,
    kasa,
    lora_ga,
    lora_pro,
    sora,
)
from .recipe import Recipe

RECIPES: Mapping[str, Recipe] = {
    "allora": allora.RECIPE,
    "ba-lora": ba_lora.RECIPE,
    "comp-lora": comp_lora.RECIPE,
    "flexora": flexora.RECIPE,
    "ggpo": ggpo.RECIPE,
    "glad": glad.RECIPE,
    "inttune": core.INTTUNE,
    "kasa": kasa.RECIPE,
    "lora-ga": lora_ga.RECIPE,
    "lora-pro": lora_pro.RECIPE,
    "lora-sb": core.LORA_SB,
    "sora": sora.RECIPE,
}
