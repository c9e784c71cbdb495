"""Requests and tokens a minute, by key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.api.errors import ApiError
from loraplex_server.api.middleware.rate_limit import RateLimiter
from loraplex_server.api_keys import ApiKey, Scope
from loraplex_server.settings import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio
PLAIN = ApiKey.of("plain-secret", Scope.INFER)
FEW = replace(ApiKey.of("few-requests", Scope.INFER), requests_per_minute=2)
SHORT = replace(ApiKey.of("few-tokens", Scope.INFER), tokens_per_minute=10)


@pytest.fixture
def limited(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    http = HttpConfig(api_keys=(PLAIN, FEW, SHORT))
    front = make_front(tokenizer, base_spec, tmp_path, http)
    yield front
    front.store.close()


def use(front: Front, secret: str) -> None:
    front.headers = {"authorization": f"Bearer {secret}"}


async def test_a_key_that_sent_its_requests_is_told_when_to_come_back(limited: Front) -> None:
    use(limited, "few-requests")
    first = await limited.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert (await limited.complete()).status_code == 200
    refused = await limited.chat()
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "2 requests a minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert len(limited.engine.requests) == 2
    # reading is free, and other keys are not concerned
    assert (await limited.client.get("/v1/models", headers=limited.headers)).status_code == 200
    use(limited, "plain-secret")
    answer = await limited.chat()
    assert answer.status_code == 200
    assert "x-ratelimit-limit-requests" not in answer.headers


async def test_tokens_of_prompt_and_answer_are_paid_by_the_key(limited: Front) -> None:
    use(limited, "few-tokens")
    answer = await limited.complete(max_tokens=20, ignore_eos=True)  # not cut off
    assert answer.json()["usage"]["completion_tokens"] == 20
    refused = await limited.complete()
    assert refused.status_code == 429
    assert "10 tokens a minute" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 50  # the debt is waited for
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    # what makes no tokens goes on
    assert (await limited.post("/tokenize", {"prompt": "hi"})).status_code == 200


async def test_a_stream_pays_while_it_runs(limited: Front) -> None:
    limited.engine.manual = True
    use(limited, "few-tokens")
    running = asyncio.create_task(limited.complete(stream=True, max_tokens=40, ignore_eos=True))
    await limited.engine.arrival()
    for _ in range(9):
        limited.engine.step()
    assert (await limited.complete()).status_code == 429
    for _ in range(31):
        limited.engine.step()
    assert (await running).status_code == 200


async def test_a_call_that_the_engine_refuses_costs_no_tokens(limited: Front) -> None:
    limited.engine.max_queue = 0
    use(limited, "few-tokens")
    refused = await limited.complete(prompt="many words " * 20)
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "10"


def test_a_bucket_refills_evenly_and_never_above_a_minute() -> None:
    now = 0.0
    key = replace(FEW, requests_per_minute=6, tokens_per_minute=60)
    meter = RateLimiter(key, lambda: now)
    for _ in range(6):
        meter.take_request()
    with pytest.raises(ApiError, match=r"10\.0 s"):
        meter.take_request()
    now = 10.0
    meter.take_request()
    with pytest.raises(ApiError):
        meter.take_request()
    meter.take_tokens(90)  # 30 more than there are
    with pytest.raises(ApiError, match=r"31\.0 s"):
        meter.check_tokens()
    now = 41.0
    meter.check_tokens()
    now = 1000.0
    assert meter.headers() == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "6",
        "x-ratelimit-reset-requests": "0.000s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0.000s",
    }
