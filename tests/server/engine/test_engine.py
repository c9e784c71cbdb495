"""The engine as its clients see it, on a tiny real model."""

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_server.engine.adapters.adapter_memory import AdapterMemory
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import (
    ContextOverflow,
    EngineDead,
    EngineDraining,
    EngineError,
    QueueFull,
)
from loraplex_server.engine.requests.client import STEP_TOKENS, GenerationRequest, TenantShare
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.engine.requests.inbox import Inbox, Unload
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import VOCAB_SIZE, tiny_model
from tests.support.servers.engines import (
    GREEDY,
    Answer,
    PlanLease,
    generate,
    generate_all,
    running_engine,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    with running_engine(model) as running:
        yield running


def _prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def _expected(model: PreTrainedModel, prompt: list[int], n_tokens: int = 20) -> list[int]:
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def test_a_mixed_batch_answers_as_transformers_does(model: PreTrainedModel, engine: Engine) -> None:
    prompts = _prompts(3, 17, 40, 70, 1, 100)
    for prompt, answer in zip(prompts, generate_all(engine, prompts), strict=True):
        assert answer.token_ids == _expected(model, prompt)
        assert answer.finish is FinishReason.LENGTH


def test_only_the_engine_thread_has_compute_threads(model: PreTrainedModel) -> None:
    seen: list[int] = []
    watched = copy.deepcopy(model)
    rotary: torch.nn.Module = watched.get_submodule("model.rotary_emb")  # stays transformers' own
    rotary.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with running_engine(watched, fuse=False, threads=2) as engine:
        assert torch.get_num_threads() == 1
        seen.clear()  # of the base's check at start
        generate_all(engine, _prompts(5))
    assert set(seen) == {2}


def test_chunked_prefill_changes_nothing(model: PreTrainedModel) -> None:
    prompts = _prompts(50, 33, 9)
    with running_engine(model, max_step_tokens=7) as engine:
        answers = generate_all(engine, prompts)
    assert [a.token_ids for a in answers] == [_expected(model, prompt) for prompt in prompts]


def test_the_tokens_of_each_step_are_counted(model: PreTrainedModel) -> None:
    with running_engine(model, max_step_tokens=7, drafts="off") as engine:
        generate_all(engine, _prompts(50), SamplingParams(max_tokens=5, temperature=0.0))
        stats = engine.stats()
    # 7 steps of 7 prompt tokens, one of the last, then 4 of one answer token each
    assert dict(zip(STEP_TOKENS, stats.steps_by_tokens, strict=False)) == {
        **dict.fromkeys(STEP_TOKENS, 0),
        1: 5,
        8: 7,
    }
    assert stats.n_steps == 12
    assert stats.n_step_tokens == 54


def test_sizes_are_told_before_the_first_step(model: PreTrainedModel) -> None:
    """Routers place requests by them."""
    with running_engine(model, max_batch_size=5, max_loras=3) as engine:
        stats = engine.stats()
    assert (stats.max_batch_size, stats.pool_slots_total) == (5, 3)
    assert stats.pool_bytes_total > 0
    assert stats.kv_pages_total > 0


def test_preempted_requests_lose_nothing(model: PreTrainedModel) -> None:
    prompts = _prompts(30, 30, 30, 30)
    page = 2 * 3 * 2 * 16 * 16 * 4  # K and V, layers, KV heads, head size, tokens, bytes
    with running_engine(model, kv_memory_bytes=9 * page) as engine:
        answers = generate_all(engine, prompts, SamplingParams(max_tokens=40, temperature=0.0))
        assert engine.stats().n_preemptions > 0
        assert engine.stats().kv_pages_used == 0
    assert [a.token_ids for a in answers] == [_expected(model, p, 40) for p in prompts]


def test_a_repeated_prompt_is_taken_from_the_prefix_cache(
    model: PreTrainedModel, engine: Engine
) -> None:
    (prompt,) = _prompts(60, seed=7)

    async def twice() -> tuple[Answer, Answer]:
        return await generate(engine, prompt), await generate(engine, prompt)

    first, second = asyncio.run(twice())
    assert first.last.n_cached == 0
    assert second.last.n_cached == 48
    assert first.token_ids == second.token_ids == _expected(model, prompt)


def test_tenants_do_not_share_prefixes(engine: Engine) -> None:
    (prompt,) = _prompts(60, seed=8)

    async def both() -> Answer:
        await generate(engine, prompt, salt="one")
        return await generate(engine, prompt, salt="two")

    assert asyncio.run(both()).last.n_cached == 0


def test_a_seeded_request_is_the_same_alone_and_among_others(engine: Engine) -> None:
    prompts = _prompts(20, 31, 9, 55)
    sampling = SamplingParams(max_tokens=20, temperature=1.2, top_p=0.9, seed=11)
    together = generate_all(engine, prompts, sampling)
    alone = [generate_all(engine, [prompt], sampling)[0] for prompt in prompts]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_requests_without_a_seed_differ(engine: Engine) -> None:
    (prompt,) = _prompts(5)
    sampling = SamplingParams(max_tokens=20, temperature=2.0)
    answers = generate_all(engine, [prompt] * 2, sampling)
    assert answers[0].token_ids != answers[1].token_ids


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(
    model: PreTrainedModel, engine: Engine
) -> None:
    (prompt,) = _prompts(12)
    expected = _expected(model, prompt)
    stop = expected[5]
    sampling = replace(GREEDY, stop_token_ids=frozenset({stop}))
    (answer,) = generate_all(engine, [prompt], sampling)
    assert answer.token_ids == expected[: expected.index(stop)]
    assert answer.finish is FinishReason.STOP
    assert answer.last.stop_token == stop


def test_prompt_logprobs_are_those_of_the_model(model: PreTrainedModel, engine: Engine) -> None:
    (prompt,) = _prompts(40)
    sampling = replace(GREEDY, logprobs=2, prompt_logprobs=2)
    (answer,) = generate_all(engine, [prompt], sampling)
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    found = answer.events[0].prompt_logprobs
    assert found[0] is None
    assert len(found) == len(prompt)
    for position, entry in enumerate(found[1:], start=1):
        assert entry is not None
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(table[position - 1, entry.token_id]), abs=1e-4)
        assert entry.top[0][0] == int(table[position - 1].argmax())


def test_the_context_limit_ends_the_answer(model: PreTrainedModel) -> None:
    (prompt,) = _prompts(20)
    with running_engine(model, max_model_len=24) as engine:
        (answer,) = generate_all(engine, [prompt])
    assert answer.token_ids == _expected(model, prompt, 4)
    assert answer.finish is FinishReason.LENGTH


def _submit(engine: Engine, **changes: Any) -> None:
    fields: dict[str, Any] = {"request_id": "x", "prompt_ids": (1, 2), "sampling": GREEDY}

    async def run() -> None:
        engine.submit(GenerationRequest(**(fields | changes)), lambda event: None)

    asyncio.run(run())


def test_a_prompt_beyond_the_context_is_refused_at_the_door(engine: Engine) -> None:
    with pytest.raises(ContextOverflow, match="256"):
        _submit(engine, prompt_ids=tuple([1] * 256))


def test_an_empty_prompt_is_refused_at_the_door(engine: Engine) -> None:
    with pytest.raises(ContextOverflow, match="empty"):
        _submit(engine, prompt_ids=())


def test_a_request_that_never_fits_the_kv_memory_fails_with_a_remedy(
    model: PreTrainedModel,
) -> None:
    page = 2 * 3 * 2 * 16 * 16 * 4
    with running_engine(model, kv_memory_bytes=2 * page) as engine:
        long, short = generate_all(engine, _prompts(40, 8), replace(GREEDY, max_tokens=10))
    assert long.finish is FinishReason.ERROR
    assert "--kv-memory" in str(long.last.error)
    assert short.finish is FinishReason.LENGTH


def test_a_full_queue_refuses_with_a_time_to_retry(model: PreTrainedModel) -> None:
    async def run(engine: Engine) -> QueueFull:
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def flood() -> None:
            for index in range(50):
                source = GenerationRequest(f"r{index}", (1, 2), replace(GREEDY, max_tokens=200))
                engine.submit(source, events.put_nowait)

        with pytest.raises(QueueFull) as refused:
            flood()
        return refused.value

    with running_engine(model, max_queue=3, max_batch_size=1) as engine:
        error = asyncio.run(run(engine))
    assert error.retry_after_s >= 1.0


def test_a_cancelled_request_gets_its_last_event_and_frees_its_pages(engine: Engine) -> None:
    async def run() -> list[TokenEvent]:
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        source = GenerationRequest("gone", (1, 2, 3), replace(GREEDY, max_tokens=200))
        engine.submit(source, events.put_nowait)
        seen = [await events.get()]
        engine.cancel("gone")
        while seen[-1].finish is None:
            seen.append(await events.get())
        return seen

    seen = asyncio.run(run())
    assert seen[-1].finish is FinishReason.CANCELLED
    assert len(seen) < 100
    generate_all(engine, [[4, 5]])
    assert engine.stats().kv_pages_used == 0


def test_cancelling_an_unknown_request_is_fine(engine: Engine) -> None:
    engine.cancel("nobody")
    assert generate_all(engine, [[4, 5]])[0].finish is FinishReason.LENGTH


def test_draining_lets_running_requests_finish_and_refuses_new_ones(
    model: PreTrainedModel,
) -> None:
    async def run(engine: Engine) -> tuple[Answer, bool]:
        answer = asyncio.create_task(generate(engine, [1, 2, 3]))
        await asyncio.sleep(0)
        drained = await engine.drain(30.0)
        with pytest.raises(EngineDraining):
            engine.submit(GenerationRequest("late", (1,), GREEDY), lambda event: None)
        return await answer, drained

    with running_engine(model) as engine:
        answer, drained = asyncio.run(run(engine))
    assert drained
    assert answer.finish is FinishReason.LENGTH


def test_a_drain_that_takes_too_long_cuts_off_with_a_final_event(model: PreTrainedModel) -> None:
    async def run(engine: Engine) -> tuple[Answer, bool]:
        slow = asyncio.create_task(generate(engine, [1, 2, 3], replace(GREEDY, max_tokens=250)))
        await asyncio.sleep(0)
        drained = await engine.drain(0.0)
        return await slow, drained

    with running_engine(model) as engine:
        answer, drained = asyncio.run(run(engine))
    assert not drained
    assert answer.finish is FinishReason.ERROR
    assert isinstance(answer.last.error, EngineDraining)


def _fail_on(engine: Engine, *request_ids: str) -> None:
    """The model fails whenever one of these is in a step."""
    runner = engine.loop.runner
    whole_run = runner.run

    def run(chunks: Any) -> Any:
        if any(chunk.request.id in request_ids for chunk in chunks):
            raise RuntimeError("poisoned")
        return whole_run(chunks)

    runner.run = run  # type: ignore[method-assign]


def test_a_step_that_fails_takes_only_the_guilty_request(model: PreTrainedModel) -> None:
    prompts = _prompts(10, 11, 12)
    with running_engine(model) as engine:
        _fail_on(engine, "r1")
        answers = generate_all(engine, prompts)
    assert answers[1].finish is FinishReason.ERROR
    assert "failed on this request" in str(answers[1].last.error)
    assert answers[0].token_ids == _expected(model, prompts[0])
    assert answers[2].token_ids == _expected(model, prompts[2])


def test_any_number_of_requests_that_fail_stops_nobody_else(model: PreTrainedModel) -> None:
    (prompt,) = _prompts(10)

    async def run(engine: Engine) -> tuple[list[Answer], Answer]:
        failed = [await generate(engine, prompt, request_id=f"bad{i}") for i in range(5)]
        return failed, await generate(engine, prompt)

    with running_engine(model) as engine:
        _fail_on(engine, *(f"bad{i}" for i in range(5)))
        failed, good = asyncio.run(run(engine))
        assert engine.alive
    assert all("failed on this request" in str(answer.last.error) for answer in failed)
    assert not any(isinstance(answer.last.error, EngineDead) for answer in failed)
    assert good.token_ids == _expected(model, prompt)


def test_a_device_that_runs_nothing_any_more_stops_the_engine(model: PreTrainedModel) -> None:
    with running_engine(model) as engine:
        _fail_on(engine, "r")

        def probe() -> None:
            raise RuntimeError("device lost")

        engine.loop.runner.probe = probe  # type: ignore[method-assign]
        answer = asyncio.run(generate(engine, [1, 2, 3]))
        assert "failed on this request" in str(answer.last.error)
        engine._thread.join()
        assert not engine.alive
        with pytest.raises(EngineDead, match="engine stopped"):
            _submit(engine)


def test_the_probe_of_the_model_writes_no_kv(model: PreTrainedModel, engine: Engine) -> None:
    runner, kv_cache = engine.loop.runner, engine.loop.kv_cache
    before = [layer.clone() for layer in (*kv_cache.keys, *kv_cache.values)]
    runner.probe()
    after = (*kv_cache.keys, *kv_cache.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class _OutOfLuck(BaseException):
    """What no request is to blame for."""


def _kill(engine: Engine, n_requests: int = 1) -> None:
    """Its first step of so many requests ends the thread."""
    run_step = engine.loop.runner.run

    def run(chunks: Any) -> Any:
        if len(chunks) < n_requests:
            return run_step(chunks)
        raise _OutOfLuck("out of luck")

    engine.loop.runner.run = run  # type: ignore[method-assign]


def test_the_death_of_the_engine_is_heard_by_everybody(model: PreTrainedModel) -> None:
    with running_engine(model) as engine:
        _kill(engine, n_requests=3)
        endless = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
        answers = generate_all(engine, _prompts(3, 4, 5), endless)
        engine._thread.join()
        assert all(isinstance(answer.last.error, EngineDead) for answer in answers)
        assert not engine.alive
        with pytest.raises(EngineDead, match="engine stopped"):
            _submit(engine)


def test_a_dead_engine_answers_every_question_at_once(model: PreTrainedModel) -> None:
    async def ask(engine: Engine) -> tuple[int, bool]:
        engine.set_pinned("a" * 64, True)
        engine.cancel("nobody")
        return await engine.unload("a" * 64), await engine.drain(30.0)

    with running_engine(model) as engine:
        _kill(engine)
        generate_all(engine, [[1]])
        engine._thread.join()
        assert asyncio.run(ask(engine)) == (0, True)
        assert engine.stats().n_running == 0


def test_an_unload_that_waits_for_a_load_is_answered_when_the_engine_dies(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, copied = lora_plan(model, rank=4, seed=1), threading.Event()
    monkeypatch.setattr(AdapterMemory, "copy", lambda *_: copied.wait())

    async def ask(engine: Engine) -> int:
        engine.warm(PlanLease(engine.packer.prepare(plan)))
        unloading = asyncio.create_task(engine.unload(plan.digest))
        assert await engine.unload("a" * 64) == 0  # the engine has read what came before
        assert not unloading.done()
        await generate(engine, [1])
        return await unloading

    with running_engine(model) as engine:
        _kill(engine)
        try:
            assert asyncio.run(ask(engine)) == 0
        finally:
            copied.set()


def test_what_is_asked_while_the_engine_dies_is_answered() -> None:
    """A message is either read or handed back: none is lost between the two."""

    async def ask() -> int:
        inbox = Inbox(max_queue=4)
        unload = Unload("a" * 64, Future())
        assert inbox.post(unload)
        (left,) = inbox.close(EngineDead("gone"))
        assert not inbox.post(lambda: None)
        assert left is unload
        unload.answer(7)
        return await asyncio.wrap_future(unload.freed)

    assert asyncio.run(ask()) == 7


def test_what_waits_is_counted_by_tenant(model: PreTrainedModel) -> None:
    """As /ready needs it: at once, also what the engine thread has not read yet."""

    async def run(engine: Engine) -> None:
        go, run_step = threading.Event(), engine.loop.runner.run

        def held(chunks: Any) -> Any:
            assert go.wait(60)
            return run_step(chunks)

        engine.loop.runner.run = held  # type: ignore[method-assign]
        share, done = TenantShare("acme", max_queued=3), asyncio.Queue[TokenEvent]()
        one = replace(GREEDY, max_tokens=1)
        running = asyncio.create_task(generate(engine, [1], one, request_id="first"))
        await asyncio.sleep(0)
        while engine.n_queued(""):  # it is in the step that is held
            await asyncio.sleep(0)
        for number in range(3):
            assert engine.n_queued("acme") == number
            waiting = GenerationRequest(f"r{number}", (1,), one, share=share)
            engine.submit(waiting, done.put_nowait)
        with pytest.raises(QueueFull, match="tenant are waiting"):
            engine.submit(GenerationRequest("more", (1,), one, share=share), done.put_nowait)
        assert engine.n_queued("acme") == 3
        go.set()
        await running
        for _ in range(3):
            await done.get()
        assert engine.n_queued("acme") == 0

    with running_engine(model) as engine:
        asyncio.run(run(engine))


def test_a_place_is_made_of_rows_whose_adapter_is_not_pinned(model: PreTrainedModel) -> None:
    plans = [lora_plan(model, rank=4, seed=seed) for seed in (1, 2, 3)]
    pinned, other, mine = map(PlanLease, plans)

    async def run(engine: Engine) -> None:
        engine.set_pinned(pinned.digest, True)
        long = replace(GREEDY, max_tokens=240, ignore_eos=True)
        flood: asyncio.Queue[TokenEvent] = asyncio.Queue()
        for number, lease in enumerate((pinned, other, other)):
            request = GenerationRequest(
                f"long{number}", (1,), long, lease, share=TenantShare("flood")
            )
            engine.submit(request, flood.put_nowait)
        started: set[str] = set()
        while len(started) < 3:
            started.add((await flood.get()).request_id)
        got: asyncio.Queue[TokenEvent] = asyncio.Queue()
        small = GenerationRequest("small", (1,), GREEDY, mine, share=TenantShare("small"))
        engine.submit(small, got.put_nowait)
        while (event := await got.get()).finish is None:
            pass
        assert event.error is None
        assert engine.stats().n_fairness_preemptions == 2

    with running_engine(model, max_loras=2) as engine:
        asyncio.run(run(engine))


def test_an_id_that_is_running_is_refused(engine: Engine) -> None:
    async def run() -> None:
        long = replace(GREEDY, max_tokens=250)
        first = asyncio.create_task(generate(engine, [1], long, request_id="same"))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="same"):
            engine.submit(GenerationRequest("same", (1,), GREEDY), lambda event: None)
        engine.cancel("same")
        await first

    asyncio.run(run())
