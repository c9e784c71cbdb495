"""The start of an adapter of a language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_training.engine.data import Datum
from loraplex_training.recipes.recipe import Start

if TYPE_CHECKING:
    from loraplex_training.engine.frozen_model import FrozenModel


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderStart(Start):
    """Offers the parts of a language model that some families need, beside its linears."""

    model: "FrozenModel"
    data: Sequence[Datum]  # a sample of the training data
