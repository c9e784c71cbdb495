"""Vectors, classes and scores: OpenAI's embeddings, and the rest as vLLM has it."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.scores import RerankBody, Reranked, ScoreBody, Scores
from loraplex_server.api.protocol.vectors import (
    Classification,
    ClassifyBody,
    EmbeddingList,
    EmbeddingsBody,
    PoolingBody,
    PoolingList,
)
from loraplex_server.api.serving.scoring import RerankCall, ScoreCall
from loraplex_server.api.serving.vectors import ClassifyCall, EmbeddingsCall, PoolingCall
from loraplex_server.api.state import State

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)
_RESPONSES = errors(404, 415, 422, 499)


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=_RESPONSES)
async def embeddings(body: EmbeddingsBody, request: Request, state: State) -> Response:
    """Of the base through any adapter, or of the sentence encoder by its name."""
    return await EmbeddingsCall(state, request, body).respond()


@router.post("/pooling", response_model=PoolingList, responses=_RESPONSES)
async def pooling(body: PoolingBody, request: Request, state: State) -> Response:
    """What the adapter is for: vectors, probabilities of labels, or those of each token."""
    return await PoolingCall(state, request, body).respond()


@router.post("/classify", response_model=Classification, responses=_RESPONSES)
async def classify(body: ClassifyBody, request: Request, state: State) -> Response:
    """Through a SEQ_CLS adapter."""
    return await ClassifyCall(state, request, body).respond()


@router.post("/v1/score", response_model=Scores, responses=_RESPONSES)
@router.post("/score", response_model=Scores, responses=_RESPONSES)
async def score(body: ScoreBody, request: Request, state: State) -> Response:
    """Through a SEQ_CLS adapter of one label; otherwise the cosine of embeddings."""
    return await ScoreCall(state, request, body).respond()


@router.post("/v2/rerank", response_model=Reranked, responses=_RESPONSES)
@router.post("/v1/rerank", response_model=Reranked, responses=_RESPONSES)
@router.post("/rerank", response_model=Reranked, responses=_RESPONSES)
async def rerank(body: RerankBody, request: Request, state: State) -> Response:
    """Documents by their score beside the query, the best first."""
    return await RerankCall(state, request, body).respond()
