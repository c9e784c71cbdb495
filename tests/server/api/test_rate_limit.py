"""Requests and tokens a minute, by key."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.requests.client import TenantShare
from loraplex_server.errors import ApiError
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.servers.asgi_call import AsgiCall

pytestmark = pytest.mark.anyio
PLAIN = ApiKey.of("plain-secret", Scope.INFER)
FEW = replace(ApiKey.of("few-requests", Scope.INFER), requests_per_minute=2)
SHORT = replace(ApiKey.of("few-tokens", Scope.INFER), tokens_per_minute=100)
HEAVY = replace(ApiKey.of("heavy-secret", Scope.INFER), weight=2.0, max_running=3, max_queued=4)


@pytest.fixture
def limited(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    http = HttpConfig(api_keys=(PLAIN, FEW, SHORT, HEAVY))
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
    # reading counts, but for probes and what Prometheus reads; other keys are not concerned
    get = limited.client.get
    assert (await get("/v1/models", headers=limited.headers)).status_code == 429
    for path in ("/health", "/ready"):
        assert (await get(path, headers=limited.headers)).status_code == 200
    assert (await get("/metrics", headers=limited.headers)).status_code == 403  # and not 429
    use(limited, "plain-secret")
    answer = await limited.chat()
    assert answer.status_code == 200
    assert "x-ratelimit-limit-requests" not in answer.headers


def left(answer: httpx.Response) -> int:
    return int(answer.headers["x-ratelimit-remaining-tokens"])


async def test_tokens_are_reserved_before_a_call_runs_and_settled_after_it(limited: Front) -> None:
    limited.engine.manual = True
    use(limited, "few-tokens")
    n_prompt = 1
    body = {"prompt": [5], "max_tokens": 30, "n": 2, "ignore_eos": True}
    running = asyncio.create_task(limited.complete(**body))
    await limited.engine.arrival(2)
    beside = await limited.complete(prompt=[5], max_tokens=99)  # 61 of 100 are reserved
    assert beside.status_code == 429
    error = beside.json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert "100 tokens a minute, and this call may take 100" in error["message"]
    assert 1 <= int(beside.headers["retry-after"]) <= 37
    for _ in range(30):
        limited.engine.step()
    assert (await running).json()["usage"]["completion_tokens"] == 60
    limited.engine.manual = False
    after = await limited.complete(prompt=[5], max_tokens=20)
    assert after.status_code == 200
    used = n_prompt + after.json()["usage"]["completion_tokens"]
    last = await limited.post("/tokenize", {"prompt": "hi"})
    assert left(last) >= 39 - used  # it refills at 1.7 a second


@pytest.mark.parametrize("how", ["stop", "cancel", "error", "disconnect"])
async def test_what_was_not_used_is_given_back_however_a_call_ends(
    limited: Front, how: str
) -> None:
    limited.engine.manual = True
    use(limited, "few-tokens")
    body = {"model": "base", "prompt": [5], "max_tokens": 90, "ignore_eos": True}
    if how == "disconnect":
        headers = limited.headers
        async with AsgiCall(limited.app, "POST", "/v1/completions", body=body, headers=headers):
            await limited.engine.arrival()
            limited.engine.step()
    else:
        stop = {"stop": ["H", "e", "l"]} if how == "stop" else {}
        running = asyncio.create_task(limited.complete(**body, **stop))
        await limited.engine.arrival()
        if how == "error":
            limited.engine.step()
            limited.engine.fail(EngineError("bad luck"))
        elif how == "cancel":
            limited.engine.step()
            limited.engine.cancel(limited.engine.requests[0].request_id)
        else:
            while not running.done():
                limited.engine.step()
                await asyncio.sleep(0)
        await running
    seen = await limited.post("/tokenize", {"prompt": "hi"})
    assert left(seen) >= 90  # else it takes 48 seconds to refill so far


async def test_a_call_that_can_never_fit_is_told_so(limited: Front) -> None:
    use(limited, "few-tokens")
    never = await limited.complete(prompt=[5], max_tokens=50, n=2)
    assert never.status_code == 400
    error = never.json()["error"]
    assert error["code"] == "tokens_above_limit"
    assert "101 tokens" in error["message"]
    assert "100 a minute" in error["message"]
    assert left(never) == 100
    # without max_tokens an answer may be as long as the limit allows
    assert (await limited.chat()).status_code == 200
    assert limited.engine.requests[-1].sampling.max_tokens < 100


async def test_a_burst_does_not_overdraw(limited: Front) -> None:
    limited.engine.manual = True
    use(limited, "few-tokens")
    calls = [
        asyncio.create_task(limited.complete(prompt=[5], max_tokens=46, ignore_eos=True))
        for _ in range(6)
    ]
    await limited.engine.arrival(2)
    while sum(call.done() for call in calls) < 4:
        await asyncio.sleep(0)
    for _ in range(46):
        limited.engine.step()
    answers = await asyncio.gather(*calls)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]


async def test_weights_and_caps_of_the_key_reach_the_engine(limited: Front) -> None:
    use(limited, "heavy-secret")
    assert (await limited.complete()).status_code == 200
    share = limited.engine.requests[-1].share
    assert share == TenantShare(HEAVY.tenant, 2.0, max_running=3, max_queued=4)
    too_many = await limited.complete(n=5)
    assert too_many.status_code == 400
    assert "more than the 4 choices" in too_many.json()["error"]["message"]


async def test_a_call_that_the_engine_refuses_costs_no_tokens(limited: Front) -> None:
    limited.engine.max_queue = 0
    use(limited, "few-tokens")
    refused = await limited.complete(prompt=[5] * 20, max_tokens=5)
    assert refused.json()["error"]["code"] == "queue_full"
    assert left(refused) == 100


async def test_a_bucket_refills_evenly_and_never_above_a_minute() -> None:
    now = 0.0
    key = replace(FEW, requests_per_minute=6, tokens_per_minute=60)
    meter = Meter(key, lambda: now)
    for _ in range(6):
        await meter.take_request()
    with pytest.raises(ApiError, match=r"10\.0 s"):
        await meter.take_request()
    now = 10.0
    await meter.take_request()
    with pytest.raises(ApiError):
        await meter.take_request()
    await meter.reserve_tokens(60)
    with pytest.raises(ApiError, match=r"1\.0 s"):
        meter.check_tokens()
    with pytest.raises(ApiError, match=r"may take 30; try again in 30\.0 s"):
        await meter.reserve_tokens(30)
    meter.give_back_tokens(29)
    with pytest.raises(ApiError, match=r"1\.0 s"):
        await meter.reserve_tokens(30)
    now = 11.0
    await meter.reserve_tokens(30)
    now = 1000.0
    meter.give_back_tokens(30)  # never above a minute's worth
    assert meter.headers() == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "6",
        "x-ratelimit-reset-requests": "0.000s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0.000s",
    }
