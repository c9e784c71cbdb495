"""POST /score and /rerank, as vLLM, Jina and Cohere have them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .body import INT64_END, Body, Few
from .vectors import PromptUsage, VectorAnswer, VectorBody

__all__ = ["RerankBody", "Reranked", "ScoreBody", "Scores"]

# What the two sides of a pair are called; a body has exactly one of these pairs.
NAMES_OF_PAIRS = (
    *(("text_1", "text_2"), ("data_1", "data_2")),
    *(("queries", "documents"), ("queries", "items")),
)
_Texts = str | Annotated[Few[str], Field(min_length=1)]


class ScoreBody(VectorBody):
    """One text or many beside many: 1 with 1, 1 with n, or n with n."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {name: {"type": ["string", "array"]} for name in names},
                    "required": list(names),
                }
                for names in NAMES_OF_PAIRS
            ]
        }
    )

    text_1: _Texts | None = None
    text_2: _Texts | None = None
    data_1: _Texts | None = None
    data_2: _Texts | None = None
    queries: _Texts | None = None
    documents: _Texts | None = None
    items: _Texts | None = None


class DocumentBody(Body):
    text: str


class RerankBody(VectorBody):
    query: str
    documents: str | Annotated[Few[str | DocumentBody], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None  # 0: all


class Score(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class Scores(VectorAnswer):
    data: list[Score]


class Document(BaseModel):
    text: str


class RankedDocument(BaseModel):
    index: int  # in the request
    document: Document
    relevance_score: float


class Reranked(BaseModel):
    id: str
    model: str
    usage: PromptUsage
    results: list[RankedDocument]
