"""Vectors, classes and scores: OpenAI's embeddings and vLLM's routes."""

from fastapi import APIRouter, Request, Response

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.vectors import (
    Classification,
    ClassifyBody,
    EmbeddingList,
    EmbeddingsBody,
    PoolingBody,
    PoolingList,
    RerankBody,
    Reranked,
    ScoreBody,
    Scores,
)
from loraplex_server.api.serving.vectors.scoring import answer_rerank, answer_scores
from loraplex_server.api.serving.vectors.vectors import (
    answer_classes,
    answer_embeddings,
    answer_pooling,
)
from loraplex_server.api.state import State

router = APIRouter(route_class=JsonRoute)
_RESPONSES = errors(404, 415, 422, 499)


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=_RESPONSES)
async def embeddings(body: EmbeddingsBody, request: Request, state: State) -> Response:
    """Embed texts with the base through any adapter, or with the sentence encoder."""
    return await answer_embeddings(state, request, body)


@router.post("/pooling", response_model=PoolingList, responses=_RESPONSES)
async def pooling(body: PoolingBody, request: Request, state: State) -> Response:
    """Return vectors, or probabilities of labels for each text or each token."""
    return await answer_pooling(state, request, body)


@router.post("/classify", response_model=Classification, responses=_RESPONSES)
async def classify(body: ClassifyBody, request: Request, state: State) -> Response:
    """Classify texts with a SEQ_CLS adapter."""
    return await answer_classes(state, request, body)


@router.post("/v1/score", response_model=Scores, responses=_RESPONSES)
@router.post("/score", response_model=Scores, responses=_RESPONSES)
async def score(body: ScoreBody, request: Request, state: State) -> Response:
    """Score pairs with a SEQ_CLS adapter of one label, else by the cosine of embeddings."""
    return await answer_scores(state, request, body)


@router.post("/v2/rerank", response_model=Reranked, responses=_RESPONSES)
@router.post("/v1/rerank", response_model=Reranked, responses=_RESPONSES)
@router.post("/rerank", response_model=Reranked, responses=_RESPONSES)
async def rerank(body: RerankBody, request: Request, state: State) -> Response:
    """Rank documents by their score for the query, best first."""
    return await answer_rerank(state, request, body)
