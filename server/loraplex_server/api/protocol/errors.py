"""The error object of OpenAI's API, and the documented answers of routes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Responses = dict[int | str, dict[str, Any]]  # FastAPI's type for ``responses``


class Error(BaseModel):
    """Some errors have further fields with details."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: Error


class AnthropicErrorBody(BaseModel):
    """Anthropic's form, on /v1/messages, with ``param`` and ``code`` added."""

    type: Literal["error"]
    error: Error


_MEANINGS = {
    400: "a value is wrong; the message names it",
    401: "no valid API key",
    403: "the API key may not do this",
    404: "no such adapter, model or route",
    405: "the route has other methods",
    409: "another operation on this name is running",
    412: "the adapter has changed since it was read",
    413: "the body is larger than this server accepts",
    415: "the route needs another Content-Type",
    422: "the description is unlike all tasks that the generator knows",
    429: "too many requests or tokens; see Retry-After",
    431: "the request's head is too large",
    499: "the client disconnected before the answer",
    503: "the server cannot answer now; see Retry-After",
}


_EVENT = {  # ``data`` is a chunk as JSON; the last one is ``[DONE]``
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}


def errors(*statuses: int, model: type[BaseModel] = ErrorBody) -> Responses:
    """Return the errors of every route (400, 401, 403, 413, 429, 503) and ``statuses``."""
    return answers_only(400, 401, 403, 413, 429, 503, *statuses, model=model)


def answers_only(*statuses: int, model: type[BaseModel] = ErrorBody) -> Responses:
    """Return the errors of a route that needs no key and takes no input."""
    return {
        status: {"model": model, "description": _MEANINGS[status]} for status in sorted({*statuses})
    }


def with_events(responses: Responses) -> Responses:
    """Add the events of a route that can stream."""
    content = {"text/event-stream": {"schema": _EVENT}}
    return responses | {200: {"content": content, "description": "the answer, whole or streamed"}}


def only_events(responses: Responses) -> Responses:
    """Add the events of a route with ``response_class=Response`` that always streams."""
    content = {"text/event-stream": {"schema": _EVENT}}
    return responses | {200: {"content": content, "description": "the events"}}


def text_answer(meaning: str) -> Responses:
    """Return the text answer of a route with ``response_class=Response``. Errors stay JSON."""
    return {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": meaning}
    }
