"""The fields of requests that train: the adapter's family, recipe and size, and its metric."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainingExperts(BaseModel):
    """The experts of family ``mixlora``, and the loss that balances them."""

    model_config = ConfigDict(extra="forbid")

    n_experts: Annotated[int, Field(ge=1, le=64)] = 8
    top_k: Annotated[int, Field(ge=1, le=64)] = 2
    balance: Annotated[str, Field(max_length=16)] = "pooled"  # or argmax, none
    balance_coefficient: Annotated[float, Field(ge=0, le=10)] | None = None


class TrainingBlocks(BaseModel):
    """The blocks of family ``block-lora``."""

    model_config = ConfigDict(extra="forbid")

    n_blocks: Annotated[int, Field(ge=1, le=256)] = 4
    axis: Annotated[str, Field(max_length=16)] = "rank"  # or feature


class TrainingPrefix(BaseModel):
    """The virtual tokens of family ``prefix``."""

    model_config = ConfigDict(extra="forbid")

    n_tokens: Annotated[int, Field(ge=1, le=256)] = 16


class TrainingShape(BaseModel):
    family: Annotated[str, Field(max_length=32)] = "lora"  # or dora, block-lora, mixlora, prefix
    recipe: Annotated[str, Field(max_length=32)] = "lora"  # or one of docs/recipes.md
    rank: Annotated[int, Field(ge=1, le=256)] | None = None  # null: 8
    alpha: Annotated[float, Field(gt=0, le=1024)] | None = None  # null: 2 · rank
    experts: TrainingExperts | None = None
    blocks: TrainingBlocks | None = None
    prefix: TrainingPrefix | None = None
    metric: Literal["exact", "contains", "json", "rouge-l"] | None = None
    """Scores the answers of the base and of the result, as `loraplex eval` does."""


class TrainingEvaluation(BaseModel):
    """The mean scores of the answers of the base (before) and of the result (after), 0 to 1."""

    metric: str
    n_answers: int | None = None
    score_before: float | None = None
    score_after: float | None = None
    gain: list[float] | None = None  # mean difference, and the ends of its 95 % interval
    error: str | None = None  # set in place of the scores if there were no answers
