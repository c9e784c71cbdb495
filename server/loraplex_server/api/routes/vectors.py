"""Vectors, classes and scores: OpenAI's embeddings, vLLM's routes, and zero-shot classes."""

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
    ZeroShotBody,
)
from loraplex_server.api.serving.vectors.scoring import answer_rerank, answer_scores
from loraplex_server.api.serving.vectors.vectors import (
    answer_classes,
    answer_embeddings,
    answer_pooling,
)
from loraplex_server.api.serving.vectors.zero_shot import answer_zero_shot
from loraplex_server.api.state import State

router = APIRouter(route_class=JsonRoute, tags=["Vectors, classes and scores"])
_RESPONSES = errors(404, 415, 422, 499)


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=_RESPONSES)
async def embeddings(body: EmbeddingsBody, request: Request, state: State) -> Response:
    """Embed texts or images with the base and any adapter, or texts with the sentence encoder."""
    return await answer_embeddings(state, request, body)


@router.post("/pooling", response_model=PoolingList, responses=_RESPONSES)
async def pooling(body: PoolingBody, request: Request, state: State) -> Response:
    """Return vectors, or probabilities of labels, for each text, image or token."""
    return await answer_pooling(state, request, body)


@router.post("/classify", response_model=Classification, responses=_RESPONSES)
async def classify(body: ClassifyBody, request: Request, state: State) -> Response:
    """Classify texts or images with an adapter that has a head, or with the base's own head."""
    return await answer_classes(state, request, body)


@router.post("/v1/classify/zero-shot", response_model=Classification, responses=_RESPONSES)
async def zero_shot(body: ZeroShotBody, request: Request, state: State) -> Response:
    """Classify images by label texts that the request names, on CLIP or SigLIP."""
    return await answer_zero_shot(state, request, body)


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
