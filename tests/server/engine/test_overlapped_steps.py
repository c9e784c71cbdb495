"""Steps that are scheduled while the one before runs answer as steps one after the other do."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import FinishReason
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.routed_plans import lora_plan, mixlora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.overlapping import Watched, overlapping
from tests.support.servers.engines import GREEDY, Answer, generate, generate_all, running_engine

PROMPTS = [[5, 9, 200, 31, 7], [17], list(range(40, 80)), [3, 3, 3], [250, 1, 2], [9, 8], [77] * 9]
RANDOM = SamplingParams(max_tokens=25, temperature=0.9, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@contextmanager
def overlapping_engine(
    model: PreTrainedModel, **changes: object
) -> Iterator[tuple[Engine, Watched]]:
    with overlapping() as watched, running_engine(model, **changes) as engine:
        yield engine, watched


def test_the_last_rows_of_experts_are_counted_when_the_engine_falls_idle(
    model: PreTrainedModel,
) -> None:
    """The turn that ends the last step schedules none."""
    plan = mixlora_plan(model, n_experts=4, top_k=2, rank=2, seed=5)
    sampling = replace(GREEDY, max_tokens=6, ignore_eos=True)
    with overlapping_engine(model) as (engine, watched):
        (answer,) = generate_all(engine, PROMPTS[:1], sampling, [plan])
        assert answer.last.error is None
        assert watched.n_overlapped > 0
        load = engine.experts.load(plan.digest, window_s=1e9)
    assert load is not None
    n_rows = len(PROMPTS[0]) + 5  # the last token is not run
    assert {sum(counts) for counts in load.counts.values()} == {2 * n_rows}


def outcomes(answers: list[Answer]) -> list[object]:
    return [(a.token_ids, a.finish, a.last.stop_token) for a in answers]


def _plans(model: PreTrainedModel) -> list[AdapterPlan | None]:
    loras = [lora_plan(model, rank=rank, seed=rank) for rank in (2, 8, 17)]
    return [loras[0], None, loras[1], None, loras[2], loras[0], None]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch_size": 11},
        {"max_batch_size": 3, "max_step_tokens": 7},  # prompts in chunks, a queue
        {"kv_memory_bytes": 1 << 16},  # too few pages for all: some are preempted
    ],
    ids=["all at once", "chunks", "preempted"],
)
def test_answers_are_those_of_steps_one_after_the_other(
    sampling: SamplingParams, limits: dict[str, object], model: PreTrainedModel
) -> None:
    plans = _plans(model)
    if "kv_memory_bytes" in limits:
        sampling = replace(sampling, max_tokens=45, ignore_eos=True)
    with running_engine(model, **limits) as engine:
        wanted = generate_all(engine, PROMPTS, sampling, plans)
        n_preempted = engine.stats().n_preemptions
        n_steps = engine.stats().n_steps
    with overlapping_engine(model, **limits) as (engine, watched):
        found = generate_all(engine, PROMPTS, sampling, plans)
        assert engine.loop.kv_cache.n_pages_held == 0
        assert (engine.stats().n_preemptions > 0) == (n_preempted > 0)
    assert (n_preempted > 0) == ("kv_memory_bytes" in limits)
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    assert [a.finish for a in found] == [a.finish for a in wanted]
    assert watched.n_overlapped > n_steps // 2


def test_a_stop_token_ends_a_request_whose_next_step_runs_already(
    model: PreTrainedModel,
) -> None:
    with running_engine(model) as engine:
        free = generate_all(engine, PROMPTS, RANDOM)
        stops = [answer.token_ids[4] for answer in free]
        sampling = replace(RANDOM, stop_token_ids=frozenset(stops))
        wanted = generate_all(engine, PROMPTS, sampling)
    with overlapping_engine(model) as (engine, _):
        found = generate_all(engine, PROMPTS, sampling)
        again = generate_all(engine, PROMPTS, sampling)  # from pages that were published
        assert engine.loop.kv_cache.n_pages_held == 0
        assert not engine.loop.adapters.residents
    assert outcomes(found) == outcomes(wanted)
    assert [a.token_ids for a in again] == [a.token_ids for a in wanted]
    assert {a.finish for a in found} >= {FinishReason.STOP}


@pytest.mark.parametrize(
    "sampling",
    [
        replace(RANDOM, frequency_penalty=0.5, repetition_penalty=1.1),
        replace(RANDOM, bad_words=((7, 8), (31,))),
        replace(RANDOM, min_tokens=9, stop_token_ids=frozenset(range(100))),
    ],
    ids=["penalties", "bad words", "at least some"],
)
def test_what_follows_the_tokens_before_waits_for_them(
    sampling: SamplingParams, model: PreTrainedModel
) -> None:
    with running_engine(model) as engine:
        wanted = generate_all(engine, PROMPTS, sampling)
    with overlapping_engine(model) as (engine, _):
        assert outcomes(generate_all(engine, PROMPTS, sampling)) == outcomes(wanted)


def test_log_probabilities_come_with_their_tokens(model: PreTrainedModel) -> None:
    sampling = replace(RANDOM, logprobs=2)
    with running_engine(model) as engine:
        wanted = generate_all(engine, PROMPTS, sampling)
    with overlapping_engine(model) as (engine, watched):
        found = generate_all(engine, PROMPTS, sampling)
    assert watched.n_overlapped > 0
    for mine, theirs in zip(found, wanted, strict=True):
        entries = [[e for event in a.events for e in event.logprobs] for a in (mine, theirs)]
        assert [e.token_id for e in entries[0]] == mine.token_ids == theirs.token_ids
        assert [e.logprob for e in entries[0]] == pytest.approx([e.logprob for e in entries[1]])


def test_a_prompt_that_is_preempted_has_each_log_probability_once(model: PreTrainedModel) -> None:
    """The chunk that runs when its pages are taken comes after it went back to the queue."""
    prompts = [[3, 3, 3], [250, 1, 2], list(range(100, 200))]
    sampling = replace(GREEDY, max_tokens=60, ignore_eos=True, prompt_logprobs=1)
    page = 2 * 3 * 2 * 16 * 16 * 4  # K and V, layers, KV heads, head size, tokens, bytes
    limits = {"max_step_tokens": 4, "kv_memory_bytes": 11 * page}
    with running_engine(model) as engine:
        wanted = generate_all(engine, prompts, sampling)
    with overlapping_engine(model, **limits) as (engine, watched):
        found = generate_all(engine, prompts, sampling)
        assert engine.stats().n_preemptions > 0
    assert watched.n_overlapped > 0
    for mine, theirs in zip(found, wanted, strict=True):
        entries = [answer.events[0].prompt_logprobs[1:] for answer in (mine, theirs)]
        for entry, expected in zip(*entries, strict=True):
            assert entry is not None
            assert expected is not None
            assert entry.token_id == expected.token_id
            assert entry.logprob == pytest.approx(expected.logprob, abs=1e-5)


def test_a_client_that_leaves_while_its_step_runs_takes_no_page_along(
    model: PreTrainedModel,
) -> None:
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)

    async def leave_after(engine: Engine, n_tokens: int) -> None:
        got: asyncio.Queue[Any] = asyncio.Queue()
        engine.submit(GenerationRequest("leaves", (5, 9, 20), long, None), got.put_nowait)
        n = 0
        while n < n_tokens:
            n += len((await got.get()).token_ids)
        engine.cancel("leaves")
        while (await got.get()).finish is None:
            pass

    async def both(engine: Engine) -> Answer:
        stays = asyncio.create_task(generate(engine, PROMPTS[2], GREEDY, request_id="stays"))
        await leave_after(engine, 3)
        return await stays

    with running_engine(model) as engine:
        (wanted,) = generate_all(engine, PROMPTS[2:3])
    with overlapping_engine(model) as (engine, _):
        assert asyncio.run(both(engine)).token_ids == wanted.token_ids
        # Its own pages too: of the step that still ran nothing is left.
        assert asyncio.run(generate(engine, PROMPTS[2])).token_ids == wanted.token_ids
        assert engine.loop.kv_cache.n_pages_held == 0


def test_a_step_that_fails_late_is_run_again_with_what_was_started_behind_it(
    model: PreTrainedModel,
) -> None:
    with running_engine(model) as engine:
        wanted = generate_all(engine, PROMPTS, RANDOM, _plans(model))
    with overlapping_engine(model) as (engine, watched):
        watched.failing |= {1, 14, 25}
        found = generate_all(engine, PROMPTS, RANDOM, _plans(model))
        assert watched.n_finished > 25
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
