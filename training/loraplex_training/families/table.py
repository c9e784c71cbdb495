"""The table of families that can be trained, and the adapters that learn."""

from collections.abc import Callable, Mapping, Sequence

from loraplex_training.config import PLAIN, AdapterShape, ExpertShape, PrefixShape
from loraplex_training.config import RECIPES as RANKS
from loraplex_training.engine.adapter import LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.recipes.recipe import RecipeAdapter, Start
from loraplex_training.recipes.table import RECIPES

from .block_lora import BlockLora
from .decoder_start import DecoderStart
from .dora import Dora
from .mixlora import MixLora
from .prefix import Prefix

_SAMPLE_TOKENS = 2048  # of the data that an initialisation reads

Family = Callable[[DecoderStart, AdapterShape], LearningAdapter]
"""Returns a new adapter. Called on the thread of the engine. Raises TrainingError."""


def _lora(start: Start, shape: AdapterShape) -> LearningAdapter:
    if shape.recipe == PLAIN:
        return start.fresh()
    return RecipeAdapter(RECIPES[shape.recipe], start)


FAMILIES: Mapping[str, Family] = {
    "lora": _lora,
    "dora": Dora,
    "block-lora": BlockLora,
    "mixlora": MixLora,
    "prefix": Prefix,
}


def new_adapter(
    engine: TrainingEngine, shape: AdapterShape, seed: int, data: Sequence[Datum]
) -> LearningAdapter:
    """Return a new adapter of a family, which learns by its recipe.

    Initialisations by gradients read the first 2,048 tokens of ``data``. Called on the thread of
    the engine. Raises TrainingError.
    """
    sample: list[Datum] = []
    n = 0
    for datum in data:
        if sample and n + len(datum) > _SAMPLE_TOKENS:
            break
        sample.append(datum)
        n += len(datum)
    start = DecoderStart(
        engine.model,
        lora_shape(shape),
        seed,
        (lambda probe: engine.forward_backward([Work(probe, sample)])) if sample else None,
        model=engine.model,
        data=sample,
    )
    return FAMILIES[shape.family](start, shape)


def most_parameters(shape: AdapterShape, linears: Mapping[str, tuple[int, int]]) -> int:
    """Return an upper bound of the parameters. ``linears``: name → (in, out) features."""
    outputs = sum(n_out for _, n_out in linears.values())
    if shape.family == "prefix":
        return (shape.prefix or PrefixShape()).n_tokens * outputs
    n = lora_shape(shape).n_parameters(linears) * RANKS.get(shape.recipe, 1)
    if shape.family == "mixlora":
        n *= 1 + (shape.experts or ExpertShape()).n_experts
    return n + outputs * (shape.family == "dora")


def lora_shape(shape: AdapterShape) -> LoraShape:
    """Return the part of a shape that the engine knows."""
    layers = None if shape.layers is None else tuple(shape.layers)
    return LoraShape(
        shape.rank, shape.alpha, tuple(shape.targets), shape.rslora, layers, shape.dropout
    )
