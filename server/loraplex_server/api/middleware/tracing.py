"""Records an OpenTelemetry span for each API call, with GenAI conventions. See `--otlp-endpoint`.

The client's ``traceparent`` becomes the parent. Prompts and answers are not recorded.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.request_info import info_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/adapters/generate": "generate_adapter",
    "/v1/embeddings": "embeddings",
    **{f"{at}/{name}": name for name in ("score", "rerank") for at in ("", "/v1")},
    "/v2/rerank": "rerank",
    "/classify": "classify",
    "/pooling": "pooling",
}


def otlp_provider(endpoint: str) -> TracerProvider:
    """Export spans in batches to ``endpoint``: OTLP over HTTP, as http://host:4318/v1/traces.

    Raises ValueError if the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(
            f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'loraplex[otel]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "loraplex"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Records the spans. Stands inside RequestContext, which sets the request's id."""

    def __init__(self, app: ASGIApp, provider: TracerProvider, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._tracer = provider.get_tracer("loraplex")
        self._model = model
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = _OPERATIONS.get(scope["path"]) if scope["type"] == "http" else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind

        carrier = {str(key, "latin-1"): str(value, "latin-1") for key, value in scope["headers"]}
        with self._tracer.start_as_current_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
        ) as span:
            span.set_attribute("gen_ai.operation.name", operation)
            span.set_attribute("gen_ai.provider.name", "loraplex")
            span.set_attribute("gen_ai.request.model", self._model)
            watched = _Watched(send, span)
            try:
                await self._app(scope, receive, watched)
            finally:
                _describe(span, scope, self._model, watched.status)


class _Watched:
    """Records the status and the time of the answer's first bytes."""

    def __init__(self, send: Send, span: Span) -> None:
        self._send = send
        self._span = span
        self._began = perf_counter()
        self._has_body = False
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not self._has_body and message.get("body"):
            self._has_body = True
            seconds = perf_counter() - self._began
            self._span.set_attribute("gen_ai.server.time_to_first_token", seconds)
        await self._send(message)


def _describe(span: Span, scope: Scope, model: str, status: int) -> None:
    from opentelemetry.trace import StatusCode

    info = info_of(scope)
    span.set_attribute("http.response.status_code", status or 499)
    span.set_attribute("loraplex.request_id", info.id)
    if info.adapter is not None:
        span.set_attribute("loraplex.adapter", info.adapter)
    name = "" if info.adapter is None else f":{info.adapter.partition('@')[0]}"
    span.set_attribute("gen_ai.response.model", f"{model}{name}")
    if info.n_prompt_tokens is not None:
        span.set_attribute("gen_ai.usage.input_tokens", info.n_prompt_tokens)
    if info.n_output_tokens is not None:
        span.set_attribute("gen_ai.usage.output_tokens", info.n_output_tokens)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)
