"""OpenTelemetry spans: one for a call, with the adapter, below the caller's span, without texts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora

sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

pytestmark = pytest.mark.anyio


@pytest.fixture
def exporter() -> object:
    return memory.InMemorySpanExporter()


@pytest.fixture
def traced(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path, exporter: object
) -> Iterator[Front]:
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    front = make_front(tokenizer, base_spec, tmp_path, tracing=provider)
    front.store.put_directory("pirate", write_lora(front.root / "pirate", base_spec))
    yield front
    front.store.close()


async def test_a_call_is_one_span_below_the_callers(traced: Front, exporter: object) -> None:
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    body = {"adapter": "pirate", "messages": [{"role": "user", "content": "secret"}]}
    answer = await traced.post(
        "/v1/chat/completions",
        {**body, "max_tokens": 3},
        traceparent=parent,
        **{"x-request-id": "r1"},
    )
    assert answer.status_code == 200
    (span,) = exporter.get_finished_spans()  # type: ignore[attr-defined]
    assert f"{span.context.trace_id:032x}" == "0123456789abcdef0123456789abcdef"
    assert f"{span.parent.span_id:016x}" == "0123456789abcdef"
    assert span.name == "chat base"
    found = dict(span.attributes)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.response.model"] == "base:pirate"
    assert found["loraplex.adapter"] == answer.headers["x-loraplex-adapter"]
    assert found["loraplex.request_id"] == "r1"
    assert found["gen_ai.usage.output_tokens"] == 3
    assert found["gen_ai.server.time_to_first_token"] > 0
    assert "secret" not in str(found)


async def test_a_refusal_has_its_status_and_probes_have_no_span(
    traced: Front, exporter: object
) -> None:
    assert (await traced.chat(adapter="nobody")).status_code == 404
    await traced.client.get("/health")
    await traced.client.get("/metrics")
    (span,) = exporter.get_finished_spans()  # type: ignore[attr-defined]
    assert span.attributes["http.response.status_code"] == 404
