"""The table of recipes, and the adapters that learn by them."""

from collections.abc import Mapping, Sequence

from loraplex_training.config import PLAIN
from loraplex_training.engine.adapter import LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine
from loraplex_training.errors import TrainingError

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
from .recipe import Recipe, RecipeAdapter, Start

_SAMPLE_TOKENS = 2048  # of the data that an initialisation reads

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


def check_recipe(name: str) -> None:
    """Raise TrainingError with the known names if there is no such recipe."""
    if name != PLAIN and name not in RECIPES:
        raise TrainingError(
            f"recipe {name!r} is not known; choose {PLAIN}, {', '.join(sorted(RECIPES))}"
        )


def new_adapter(
    engine: TrainingEngine, name: str, shape: LoraShape, seed: int, data: Sequence[Datum]
) -> LearningAdapter:
    """Return a new adapter that learns by the recipe ``name``; "lora" is PEFT's LoRA.

    Initialisations by gradients read the first 2,048 tokens of ``data``. Called on the thread of
    the engine. Raises TrainingError.
    """
    check_recipe(name)
    if name == PLAIN:
        return engine.new_adapter(shape, seed)
    sample: list[Datum] = []
    n = 0
    for datum in data:
        if sample and n + len(datum) > _SAMPLE_TOKENS:
            break
        sample.append(datum)
        n += len(datum)
    return RecipeAdapter(RECIPES[name], Start(engine, shape, seed, sample))
