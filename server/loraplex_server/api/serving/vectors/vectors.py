"""Embeddings, pooled rows and classes: from prompts to the items of the answer."""

import base64
from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from loraplex_adapter_store.plan import HeadTask
from loraplex_server.api.protocol.vectors import (
    ClassifyBody,
    EmbeddingsBody,
    PoolingBody,
    PoolingTask,
)
from loraplex_server.api.state import AppState
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.errors import invalid

from .inputs import Inputs
from .prompt import Prompt
from .vector_call import VectorCall, activated, head_for, in_turns
from .vector_source import VectorSource

_MAX_VALUES = 1 << 22  # numbers of an answer with a row for each token


async def answer_embeddings(state: AppState, request: Request, body: EmbeddingsBody) -> Response:
    """Answer with embeddings. Raises ApiError."""
    inputs = Inputs(state, body)
    call = VectorCall(
        state, request, body, "embd", "input", n_inputs=len(inputs), n_images=inputs.n_images
    )

    async def answer(source: VectorSource) -> bytes:
        prompts = await inputs.prompts(source, call.cut)
        vectors = await embedded(source, prompts, body)
        items = (
            {"index": i, "object": "embedding", "embedding": _encoded(row, body)}
            for i, row in enumerate(vectors)
        )
        return await call.write(source, items, sum(map(len, prompts)))

    return await call.respond(inputs.routing_text, answer)


async def answer_pooling(state: AppState, request: Request, body: PoolingBody) -> Response:
    """Answer with pooled hidden states. Raises ApiError."""
    inputs = Inputs(state, body)
    needs_head = body.task in ("classify", "token_classify")
    call = VectorCall(
        state,
        request,
        body,
        "pool",
        "input",
        n_inputs=len(inputs),
        n_images=inputs.n_images,
        needs_head=needs_head,
    )

    async def answer(source: VectorSource) -> bytes:
        task = body.task or _usual_task(source)
        if body.dimensions is not None and task not in ("embed", "token_embed"):
            raise invalid(f"dimensions are for embeddings, not for {task}", "dimensions")
        prompts = await inputs.prompts(source, call.cut)
        rows = await _pooled(source, task, prompts, body, state.store.base.hidden_size)
        items = (
            {"index": i, "object": "pooling", "data": _encoded(row, body)}
            for i, row in enumerate(rows)
        )
        return await call.write(source, items, sum(map(len, prompts)))

    return await call.respond(inputs.routing_text, answer)


async def answer_classes(state: AppState, request: Request, body: ClassifyBody) -> Response:
    """Answer with the classes of texts or images. Raises ApiError."""
    inputs = Inputs(state, body)
    call = VectorCall(
        state,
        request,
        body,
        "classify",
        "input",
        n_inputs=len(inputs),
        n_images=inputs.n_images,
        needs_head=True,
    )

    async def answer(source: VectorSource) -> bytes:
        head = head_for(source, HeadTask.SEQ_CLS, "/classify")
        prompts = await inputs.prompts(source, call.cut)
        logits = await source.read(prompts, Pooling.of_head(head))
        items = (
            {
                "index": index,
                "label": head.labels[int(row.argmax())],
                "probs": activated(head, row, body.use_activation).numpy(),
                "num_classes": len(head.labels),
            }
            for index, row in enumerate(logits)
        )
        return await call.write(source, items, sum(map(len, prompts)))

    return await call.respond(inputs.routing_text, answer)


async def _pooled(
    source: VectorSource,
    task: PoolingTask,
    prompts: Sequence[Prompt],
    body: PoolingBody,
    width: int,
) -> list[Tensor]:
    match task:
        case "embed":
            return await embedded(source, prompts, body)
        case "token_embed":
            _check_size(prompts, width)
            rows = await source.read(prompts, Pooling(None))
            return await in_turns(_shaped(row, body, normalize=True) for row in rows)
        case "classify":
            head = head_for(source, HeadTask.SEQ_CLS, "task 'classify'")
        case "token_classify":
            head = head_for(source, HeadTask.TOKEN_CLS, "task 'token_classify'")
            _check_size(prompts, len(head.labels))
    logits = await source.read(prompts, Pooling.of_head(head))
    return await in_turns(activated(head, row, body.use_activation) for row in logits)


async def embedded(
    source: VectorSource, prompts: Sequence[Prompt], body: EmbeddingsBody | None = None
) -> list[Tensor]:
    """Return a vector for each prompt, as the source's pooling and the body say.

    Raises ApiError.
    """
    if body is not None and source.width is not None:
        _check_dimensions(body.dimensions, source.width)
    rows = await source.read(prompts, Pooling(source.pooling.mode))
    if body is None:
        return rows
    normalize = source.pooling.normalize
    return await in_turns(_shaped(row, body, normalize=normalize) for row in rows)


def _shaped(rows: Tensor, body: EmbeddingsBody, *, normalize: bool) -> Tensor:
    """Truncate rows to ``dimensions`` and normalise them. Raises ApiError (400)."""
    _check_dimensions(body.dimensions, rows.shape[-1])
    rows = rows[..., : body.dimensions]
    if body.use_activation is not None:
        normalize = body.use_activation
    return F.normalize(rows, dim=-1) if normalize else rows


def _check_dimensions(requested: int | None, width: int) -> None:
    if requested is not None and requested > width:
        raise invalid(f"dimensions is {requested}, these vectors have {width}", "dimensions")


def _encoded(rows: Tensor, body: EmbeddingsBody) -> object:
    array = rows.contiguous().numpy()
    if body.encoding_format == "base64":
        return base64.b64encode(array.astype("<f4").tobytes()).decode()
    return array


def _usual_task(source: VectorSource) -> PoolingTask:
    if source.head is None:
        return "embed"
    return "classify" if source.head.task is HeadTask.SEQ_CLS else "token_classify"


def _check_size(prompts: Sequence[Prompt], width: int) -> None:
    n_values = width * sum(map(len, prompts))
    if n_values > _MAX_VALUES:
        raise invalid(
            f"a row of {width} for each token is {n_values:,} numbers, more than the "
            f"{_MAX_VALUES:,} of one answer; send fewer texts",
            "input",
        )
