"""Scores pairs of texts: by a cross-encoder if the adapter is one, else by cosine.

cross-encoder   a SEQ_CLS head of one label reads both texts as one prompt
bi-encoder      each text has a vector; the score is their cosine
"""

from collections.abc import Sequence
from typing import NamedTuple

import orjson
import torch.nn.functional as F  # noqa: N812
from starlette.requests import Request
from starlette.responses import Response

from loraplex_adapter_store.plan import HeadTask
from loraplex_server.api.protocol.vectors import NAMES_OF_PAIRS, RerankBody, ScoreBody
from loraplex_server.api.state import AppState
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.errors import invalid

from .vector_call import VectorCall, activated, head_for, in_turns
from .vector_source import VectorSource
from .vectors import embedded


async def answer_scores(state: AppState, request: Request, body: ScoreBody) -> Response:
    """Answer with the scores of pairs. Raises ApiError."""
    present = {
        name for names in NAMES_OF_PAIRS for name in names if getattr(body, name) is not None
    }
    names = next((names for names in NAMES_OF_PAIRS if present == set(names)), None)
    if names is None:
        pairs = ", ".join(f"{first} and {second}" for first, second in NAMES_OF_PAIRS)
        raise invalid(f"give one of these pairs and no other: {pairs}", "text_1")
    first, second = (_texts(getattr(body, name)) for name in names)
    scorer = _PairScorer(first, second, names)
    call = VectorCall(state, request, body, "score", names[1], n_inputs=scorer.n_texts)

    async def answer(source: VectorSource) -> bytes:
        scores, n_tokens = await scorer.scores(call, source, body.use_activation)
        items = (
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(scores)
        )
        return await call.write(source, items, n_tokens)

    return await call.respond("\n".join(first), answer)


async def answer_rerank(state: AppState, request: Request, body: RerankBody) -> Response:
    """Answer with the documents in order of their scores. Raises ApiError."""
    documents = [body.documents] if isinstance(body.documents, str) else body.documents
    texts = [document if isinstance(document, str) else document.text for document in documents]
    scorer = _PairScorer([body.query], texts, ("query", "documents"))
    call = VectorCall(state, request, body, "rerank", "documents", n_inputs=scorer.n_texts)

    async def answer(source: VectorSource) -> bytes:
        scores, n_tokens = await scorer.scores(call, source, body.use_activation)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])
        results = [
            {"index": index, "relevance_score": scores[index]}
            | ({} if body.return_documents is False else {"document": {"text": texts[index]}})
            for index in best[: body.top_n or len(texts)]
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return orjson.dumps(
            {"id": call.id, "model": source.model, "usage": usage, "results": results}
        )

    return await call.respond(body.query, answer)


class _Scored(NamedTuple):
    scores: list[float]
    n_tokens: int


class _PairScorer:
    """Scores pairs. ``first`` has one text, or as many as ``second``."""

    def __init__(self, first: Sequence[str], second: Sequence[str], names: tuple[str, str]) -> None:
        """``names``: the fields of the texts. Raises ApiError (400)."""
        if len(first) not in (1, len(second)):
            raise invalid(
                f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}; give one text, "
                "or as many",
                names[0],
            )
        self.n_texts = len(second) + len(first) - 1
        self._first, self._second, self._names = first, second, names

    async def scores(
        self, call: VectorCall, source: VectorSource, use_activation: bool | None
    ) -> _Scored:
        if source.head is None:
            return await self._by_cosine(call, source)
        head = head_for(source, HeadTask.SEQ_CLS, "a score")
        if len(head.labels) != 1:
            raise invalid(
                f"a score is one number, and {source.label} has {len(head.labels)} labels; use "
                "/classify",
                source.adapter_param,
                "adapter_has_no_head",
            )
        queries = self._first if len(self._first) > 1 else [self._first[0]] * len(self._second)
        pairs = list(zip(queries, self._second, strict=True))
        prompts = await source.encode_pairs(pairs, param=self._names[1], cut=call.cut)
        logits = await source.read(prompts, Pooling.of_head(head))
        scores = await in_turns(activated(head, row, use_activation).item() for row in logits)
        return _Scored(scores, sum(map(len, prompts)))

    async def _by_cosine(self, call: VectorCall, source: VectorSource) -> _Scored:
        prompts = []
        for texts, name in zip((self._first, self._second), self._names, strict=True):
            prompts += await source.encode(texts, param=name, special=True, cut=call.cut)
        rows = await embedded(source, prompts)
        vectors = await in_turns(F.normalize(row, dim=-1) for row in rows)
        first, second = vectors[: len(self._first)], vectors[len(self._first) :]
        if len(first) == 1:
            first = first * len(second)
        scores = await in_turns(float(a @ b) for a, b in zip(first, second, strict=True))
        return _Scored(scores, sum(map(len, prompts)))


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
