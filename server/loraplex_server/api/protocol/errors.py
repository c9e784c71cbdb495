"""The one error object, as OpenAI's clients expect it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "AnthropicErrorBody",
    "ErrorBody",
    "answers_only",
    "errors",
    "only_events",
    "text_answer",
    "with_events",
]

Responses = dict[int | str, dict[str, Any]]  # FastAPI's type for ``responses``


class Error(BaseModel):
    """Some errors add fields that explain them."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: Error


class AnthropicErrorBody(BaseModel):
    """On /v1/messages: Anthropic's form, and our ``param`` and ``code``."""

    type: Literal["error"]
    error: Error


_MEANINGS = {
    400: "a value is wrong; the message names it",
    401: "no valid API key",
    403: "the API key may not do this",
    404: "no such adapter, model or route",
    405: "the route has other methods",
    409: "something else is going on under this name",
    412: "the adapter was changed meanwhile",
    413: "larger than this server accepts",
    415: "another Content-Type is needed",
    422: "the description is unlike everything the generator knows",
    429: "too many requests or tokens; see Retry-After",
    431: "the request's head is too large",
    499: "the client left before the answer",
    503: "the server cannot answer now; see Retry-After",
}


_EVENT = {  # data: a chunk as JSON, at last ``[DONE]``
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}


def errors(*statuses: int, model: type[BaseModel] = ErrorBody) -> Responses:
    """Of a route, beside those of every route (400, 401, 403, 413, 429, 503)."""
    return answers_only(400, 401, 403, 413, 429, 503, *statuses, model=model)


def answers_only(*statuses: int, model: type[BaseModel] = ErrorBody) -> Responses:
    """Of a route that is open to everybody and takes no input."""
    return {
        status: {"model": model, "description": _MEANINGS[status]} for status in sorted({*statuses})
    }


def with_events(responses: Responses) -> Responses:
    """Of a route that also streams."""
    content = {"text/event-stream": {"schema": _EVENT}}
    return responses | {200: {"content": content, "description": "the answer, whole or streamed"}}


def only_events(responses: Responses) -> Responses:
    """Of a route with ``response_class=Response`` that always streams."""
    content = {"text/event-stream": {"schema": _EVENT}}
    return responses | {200: {"content": content, "description": "the events"}}


def text_answer(meaning: str) -> Responses:
    """Of a route with ``response_class=Response``, which names no media type: errors stay JSON."""
    return {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": meaning}
    }
