"""Embeddings, pooled rows and classes: from prompts to the answer's items."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from starlette.requests import Request
from torch import Tensor

from loraplex_adapter_store.plan import HeadTask
from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.vectors import (
    ClassifyBody,
    EmbeddingsBody,
    InputBody,
    PoolingBody,
    PoolingTask,
)
from loraplex_server.api.state import AppState
from loraplex_server.engine.pooling import Pooling

from .vector_call import Inputs, VectorCall, activated, head_for, in_turns
from .vector_source import Ids, VectorSource

__all__ = ["ClassifyCall", "EmbeddingsCall", "PoolingCall", "embedded"]

_MAX_VALUES = 1 << 22  # of one answer with a row for each token


class _InputCall(VectorCall):
    prompt_param = "input"

    def __init__(self, state: AppState, request: Request, body: InputBody) -> None:
        self.inputs = Inputs(body)
        super().__init__(state, request, body, len(self.inputs))

    @property
    def routing_text(self) -> str:
        return self.inputs.routing_text


class EmbeddingsCall(_InputCall):
    id_prefix = "embd"

    def __init__(self, state: AppState, request: Request, body: EmbeddingsBody) -> None:
        super().__init__(state, request, body)
        self._embeddings = body

    async def answer(self, source: VectorSource) -> bytes:
        prompts = await self.inputs.prompts(source, self.cut)
        vectors = await embedded(source, prompts, self._embeddings)
        items = (
            {"index": i, "object": "embedding", "embedding": _encoded(row, self._embeddings)}
            for i, row in enumerate(vectors)
        )
        return await self.write(source, items, sum(map(len, prompts)))


class PoolingCall(_InputCall):
    id_prefix = "pool"

    def __init__(self, state: AppState, request: Request, body: PoolingBody) -> None:
        super().__init__(state, request, body)
        self._pooling = body
        self.needs_head = body.task in ("classify", "token_classify")

    async def answer(self, source: VectorSource) -> bytes:
        body = self._pooling
        task = body.task or _usual_task(source)
        if body.dimensions is not None and task not in ("embed", "token_embed"):
            raise invalid(f"dimensions are for embeddings, not for {task}", "dimensions")
        prompts = await self.inputs.prompts(source, self.cut)
        rows = await self._rows(source, task, prompts)
        items = (
            {"index": i, "object": "pooling", "data": _encoded(row, body)}
            for i, row in enumerate(rows)
        )
        return await self.write(source, items, sum(map(len, prompts)))

    async def _rows(
        self, source: VectorSource, task: PoolingTask, prompts: Sequence[Ids]
    ) -> list[Tensor]:
        body = self._pooling
        match task:
            case "embed":
                return await embedded(source, prompts, body)
            case "token_embed":
                _check_size(prompts, self.state.store.base.hidden_size)
                rows = await source.read(prompts, Pooling(None))
                return await in_turns(_shaped(row, body, normalize=True) for row in rows)
            case "classify":
                head = head_for(source, HeadTask.SEQ_CLS, "task 'classify'")
            case "token_classify":
                head = head_for(source, HeadTask.TOKEN_CLS, "task 'token_classify'")
                _check_size(prompts, len(head.labels))
        logits = await source.read(prompts, Pooling.of_head(head))
        return await in_turns(activated(head, row, body.use_activation) for row in logits)


class ClassifyCall(_InputCall):
    id_prefix = "classify"
    needs_head = True

    def __init__(self, state: AppState, request: Request, body: ClassifyBody) -> None:
        super().__init__(state, request, body)
        self._classify = body

    async def answer(self, source: VectorSource) -> bytes:
        head = head_for(source, HeadTask.SEQ_CLS, "/classify")
        prompts = await self.inputs.prompts(source, self.cut)
        logits = await source.read(prompts, Pooling.of_head(head))
        items = (
            {
                "index": index,
                "label": head.labels[int(row.argmax())],
                "probs": activated(head, row, self._classify.use_activation).numpy(),
                "num_classes": len(head.labels),
            }
            for index, row in enumerate(logits)
        )
        return await self.write(source, items, sum(map(len, prompts)))


async def embedded(
    source: VectorSource, prompts: Sequence[Ids], body: EmbeddingsBody | None = None
) -> list[Tensor]:
    """One vector a prompt, as the source's pooling and the body say. Raises ApiError."""
    if body is not None and source.width is not None:
        _check_dimensions(body.dimensions, source.width)
    rows = await source.read(prompts, Pooling(source.pooling.mode))
    if body is None:
        return rows
    normalize = source.pooling.normalize
    return await in_turns(_shaped(row, body, normalize=normalize) for row in rows)


def _shaped(rows: Tensor, body: EmbeddingsBody, *, normalize: bool) -> Tensor:
    """The first ``dimensions``, of length 1 unless told otherwise. Raises ApiError (400)."""
    _check_dimensions(body.dimensions, rows.shape[-1])
    rows = rows[..., : body.dimensions]
    if body.use_activation is not None:
        normalize = body.use_activation
    return F.normalize(rows, dim=-1) if normalize else rows


def _check_dimensions(wanted: int | None, width: int) -> None:
    if wanted is not None and wanted > width:
        raise invalid(f"dimensions is {wanted}, these vectors have {width}", "dimensions")


def _encoded(rows: Tensor, body: EmbeddingsBody) -> object:
    array = rows.contiguous().numpy()
    if body.encoding_format == "base64":
        return base64.b64encode(array.astype("<f4").tobytes()).decode()
    return array


def _usual_task(source: VectorSource) -> PoolingTask:
    if source.head is None:
        return "embed"
    return "classify" if source.head.task is HeadTask.SEQ_CLS else "token_classify"


def _check_size(prompts: Sequence[Ids], width: int) -> None:
    n_values = width * sum(map(len, prompts))
    if n_values > _MAX_VALUES:
        raise invalid(
            f"a row of {width} for each token is {n_values:,} numbers, more than the "
            f"{_MAX_VALUES:,} of one answer; send fewer texts",
            "input",
        )
