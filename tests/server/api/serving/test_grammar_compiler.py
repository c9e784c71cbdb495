"""Grammars compile within their own processor time, however loaded the machine is."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from loraplex_server.api.serving.text_generation.grammars import Grammars
from tests.server.conftest import Front

pytestmark = pytest.mark.anyio


@pytest.fixture
async def with_grammars(front: Front) -> AsyncIterator[Callable[..., Grammars]]:
    made: list[Grammars] = []

    def make(**limits: float) -> Grammars:
        text = front.app.state.parts.text
        grammars = Grammars(text.backend, vocab_size=text.vocab_size, eos_token_ids={2}, **limits)
        made.append(grammars)
        front.app.state.parts.grammars = grammars
        return grammars

    yield make
    for grammars in made:
        await grammars.close()


async def _ready(grammars: Grammars) -> int:
    """The id of the process that gets the next trial, once it has answered one."""
    grammars.start()
    compiler: Any = await asyncio.wrap_future(grammars._compiler)  # type: ignore[arg-type]
    (worker,) = compiler.workers._idle
    await worker.ready()
    return int(worker._process.pid)


async def test_a_trial_that_waits_for_a_processor_is_not_refused(
    front: Front, with_grammars: Callable[..., Grammars]
) -> None:
    pid = await _ready(with_grammars(cpu_s=0.1))
    os.kill(pid, signal.SIGSTOP)
    answer = asyncio.create_task(front.complete(guided_choice=["fine"]))
    await asyncio.sleep(1.5)  # more than the kernel's whole second of processor time
    assert not answer.done()
    os.kill(pid, signal.SIGCONT)
    assert (await answer).status_code == 200


async def test_a_trial_that_never_got_a_processor_is_tried_again(
    front: Front, with_grammars: Callable[..., Grammars]
) -> None:
    grammars = with_grammars(max_s=0.5)
    os.kill(await _ready(grammars), signal.SIGSTOP)
    answer = await front.complete(guided_choice=["fine"])
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "grammar_compiler_busy"
    assert answer.headers["retry-after"]
    grammars._max_s = 60.0
    assert (await front.complete(guided_choice=["fine"])).status_code == 200


async def test_a_grammar_that_spends_its_processor_time_is_a_400_that_is_remembered(
    front: Front, with_grammars: Callable[..., Grammars]
) -> None:
    grammars = with_grammars(cpu_s=0.0)
    await _ready(grammars)
    slow = {"type": "number", "multipleOf": 1000003}
    for _ in range(2):
        answer = await front.complete(guided_json=slow)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "guided_json"
        assert "CPU time" in answer.json()["error"]["message"]
    assert (await front.complete(guided_choice=["fine"])).status_code == 200


@pytest.mark.parametrize("field", ["guided_json", "structured_outputs"])
async def test_a_schema_given_as_a_text_is_measured_before_it_is_parsed(
    front: Front, field: str
) -> None:
    text = '{"enum": [' + "1, " * 100_000 + "1]"  # not even JSON
    body: dict[str, Any] = {"guided_json": text, "structured_outputs": {"json": text}}
    answer = await front.complete(**{field: body[field]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "grammar_too_large"
    assert error["param"] == {"structured_outputs": "structured_outputs.json"}.get(field, field)


async def test_calls_that_ask_for_the_same_new_grammar_try_it_once(
    front: Front, with_grammars: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = with_grammars()
    await _ready(grammars)
    workers: Any = grammars._compiler.result().workers  # type: ignore[union-attr]
    run, tried = workers.run, []

    async def counted(*call: object, **limits: float) -> object:
        tried.append(call)
        return await run(*call, **limits)

    monkeypatch.setattr(workers, "run", counted)
    answers = await asyncio.gather(*(front.complete(guided_choice=["fine"]) for _ in range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(tried) == 1


async def test_eight_first_calls_at_once_share_one_compiler(
    front: Front, with_grammars: Callable[..., Grammars]
) -> None:
    grammars = with_grammars()
    calls = [front.complete(guided_choice=[f"fine {n}"]) for n in range(8)]
    assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 8
    compiler = grammars._compiler
    grammars.start()
    assert grammars._compiler is compiler
