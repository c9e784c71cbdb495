"""The shape of an adapter that a request asks to train."""

from loraplex_server.errors import invalid
from loraplex_training.config import (
    RECIPES,
    AdapterShape,
    BlockShape,
    ExpertShape,
    PrefixShape,
    ShapeError,
)

from .protocol.training_shape import TrainingShape

_RANK = 8


def requested_shape(body: TrainingShape, max_rank: int) -> AdapterShape:
    """Return the shape of a body. Without a rank it is 8, or ``max_rank`` if that is less.

    Raises ApiError (400), also if more than ``max_rank`` ranks would be saved.
    """
    rank = min(_RANK, max_rank) if body.rank is None else body.rank
    try:
        shape = AdapterShape(
            family=body.family,
            recipe=body.recipe,
            rank=rank,
            alpha=2.0 * rank if body.alpha is None else body.alpha,
            experts=None if body.experts is None else ExpertShape(**body.experts.model_dump()),
            blocks=None if body.blocks is None else BlockShape(**body.blocks.model_dump()),
            prefix=None if body.prefix is None else PrefixShape(**body.prefix.model_dump()),
        )
    except ShapeError as error:
        raise invalid(str(error), error.field) from error
    saved = rank * RECIPES.get(body.recipe, 1)
    if saved > max_rank:
        raise invalid(
            f"rank is {rank}, saved as {saved} by recipe {body.recipe!r}; this server serves at "
            f"most {max_rank} (--max-lora-rank)",
            "rank",
        )
    return shape
