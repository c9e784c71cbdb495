"""Scores of pairs of texts: by a cross-encoder where the adapter is one, else by cosine.

cross-encoder   a SEQ_CLS head of one label reads both texts as one prompt
bi-encoder      each text has a vector; the score is their cosine
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import orjson
import torch.nn.functional as F  # noqa: N812
from starlette.requests import Request

from loraplex_adapter_store.plan import HeadTask
from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.scores import NAMES_OF_PAIRS, RerankBody, ScoreBody
from loraplex_server.api.protocol.vectors import VectorBody
from loraplex_server.api.state import AppState
from loraplex_server.engine.pooling import Pooling

from .vector_call import VectorCall, activated, head_for, in_turns
from .vector_source import VectorSource
from .vectors import embedded

__all__ = ["RerankCall", "ScoreCall"]


class _Scored(NamedTuple):
    scores: list[float]
    n_tokens: int


class _PairCall(VectorCall):
    """``first`` has one text, or as many as ``second``."""

    def __init__(
        self,
        state: AppState,
        request: Request,
        body: VectorBody,
        first: Sequence[str],
        second: Sequence[str],
        names: tuple[str, str],
    ) -> None:
        if len(first) not in (1, len(second)):
            raise invalid(
                f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}; give one, or "
                "as many",
                names[0],
            )
        super().__init__(state, request, body, len(second) + len(first) - 1)
        self._first, self._second, self._names = first, second, names
        self._use_activation = body.use_activation

    @property
    def routing_text(self) -> str:
        return "\n".join(self._first)

    async def scores(self, source: VectorSource) -> _Scored:
        if source.head is None:
            return await self._by_cosine(source)
        return await self._by_head(source)

    async def _by_head(self, source: VectorSource) -> _Scored:
        head = head_for(source, HeadTask.SEQ_CLS, "a score")
        if len(head.labels) != 1:
            raise invalid(
                f"a score is one number, and {source.label} has {len(head.labels)} labels; ask "
                "/classify",
                source.adapter_param,
                "adapter_has_no_head",
            )
        queries = self._first if len(self._first) > 1 else [self._first[0]] * len(self._second)
        pairs = list(zip(queries, self._second, strict=True))
        encoded = await self.state.text.encode_pairs(pairs, param=self.prompt_param)
        prompts = self.cut.apply(encoded, source, self.prompt_param)
        logits = await source.read(prompts, Pooling.of_head(head))
        scores = await in_turns(activated(head, row, self._use_activation).item() for row in logits)
        return _Scored(scores, sum(map(len, prompts)))

    async def _by_cosine(self, source: VectorSource) -> _Scored:
        prompts = []
        for texts, name in zip((self._first, self._second), self._names, strict=True):
            prompts += await source.encode(texts, param=name, special=True, cut=self.cut)
        rows = await embedded(source, prompts)
        vectors = await in_turns(F.normalize(row, dim=-1) for row in rows)
        first, second = vectors[: len(self._first)], vectors[len(self._first) :]
        if len(first) == 1:
            first = first * len(second)
        scores = await in_turns(float(a @ b) for a, b in zip(first, second, strict=True))
        return _Scored(scores, sum(map(len, prompts)))


class ScoreCall(_PairCall):
    id_prefix = "score"
    prompt_param = "text_2"

    def __init__(self, state: AppState, request: Request, body: ScoreBody) -> None:
        given = {
            name for names in NAMES_OF_PAIRS for name in names if getattr(body, name) is not None
        }
        names = next((names for names in NAMES_OF_PAIRS if given == set(names)), None)
        if names is None:
            pairs = ", ".join(f"{first} and {second}" for first, second in NAMES_OF_PAIRS)
            raise invalid(f"give one of these pairs and no other: {pairs}", "text_1")
        self.prompt_param = names[1]
        first, second = (_texts(getattr(body, name)) for name in names)
        super().__init__(state, request, body, first, second, names)

    async def answer(self, source: VectorSource) -> bytes:
        scores, n_tokens = await self.scores(source)
        items = (
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(scores)
        )
        return await self.write(source, items, n_tokens)


class RerankCall(_PairCall):
    id_prefix = "rerank"
    prompt_param = "documents"

    def __init__(self, state: AppState, request: Request, body: RerankBody) -> None:
        documents = [body.documents] if isinstance(body.documents, str) else body.documents
        texts = [one if isinstance(one, str) else one.text for one in documents]
        super().__init__(state, request, body, [body.query], texts, ("query", "documents"))
        self._top_n = body.top_n or len(texts)

    async def answer(self, source: VectorSource) -> bytes:
        scores, n_tokens = await self.scores(source)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._top_n]
        results = [
            {
                "index": index,
                "document": {"text": self._second[index]},
                "relevance_score": scores[index],
            }
            for index in best
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return orjson.dumps(
            {"id": self.id, "model": source.model, "usage": usage, "results": results}
        )


def _texts(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
