"""Reads ``prediction``: a text that an answer probably repeats, as the source of drafts."""

from typing import cast

from pydantic import JsonValue

from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.api.serving.content_blocks import texts_of
from loraplex_server.errors import ApiError, invalid
from loraplex_server.text.text_pipeline import TextPipeline

_PARAM = "prediction.content"


async def prediction_ids(body: GenerationBody, text: TextPipeline, tenant: str) -> tuple[int, ...]:
    """Return the token ids of the predicted text; empty without one. Raises ApiError (400)."""
    if body.prediction is None:
        return ()
    content = "".join(
        texts_of(cast(JsonValue, body.prediction.content), _PARAM, ("text",), _unsupported)
    )
    (ids,) = await text.encode_many(
        [content], add_special_tokens=False, param=_PARAM, tenant=tenant
    )
    return ids


def _unsupported(kind: JsonValue, where: str) -> ApiError:
    return invalid(
        f"a part of type {str(kind)[:64]!r} predicts no text; only parts of type 'text' do",
        where,
        "unsupported_content",
    )
