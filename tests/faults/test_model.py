"""Native calls, operators, the tokenizer, the encoder and the generator, made to fail over HTTP."""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from torch import Tensor

from loraplex_adapter_store.operators.kinds import BlockRotation
from loraplex_kernels.cpu.lora import NativeLora
from loraplex_kernels.lora.native_decoder import NativeDecoder
from loraplex_server.engine.output_processor import OutputRouter
from tests.faults.conftest import World, check_fault
from tests.support.kth_fault import KthFault

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("owner", "seam", "adapters"),
    [
        (NativeDecoder, "__call__", ["lora", "prefix_tuning"]),  # a whole step in one call
        (NativeLora, "over_base", ["lora", "oft", "mola"]),  # layer by layer
    ],
)
async def test_a_native_call_that_fails_once_changes_no_answer(
    owner: type, seam: str, adapters: list[str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is computed again, request by request: the same bits."""
    for adapter in adapters:
        await world.learn(adapter)
    fault = KthFault(lambda: RuntimeError("the native library failed in /home/secret.cpp"))
    monkeypatch.setattr(owner, seam, fault.before(getattr(owner, seam)))
    async with world.canary():
        for k in range(6):
            fault.arm(k)
            await asyncio.gather(*(world.check_right(adapter) for adapter in adapters))
            assert fault.disarm()
    await world.check_idle()
    assert (await world.health())["status"] == "ok"


async def test_requests_that_always_fail_never_stop_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests at once, again and again, meet one adapter's broken operator."""
    await world.learn("oft")
    counted = await world.count("model")

    def broken(operator: BlockRotation, x: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied in /home/secret")

    async with world.canary():
        with monkeypatch.context() as patch:
            patch.setattr(BlockRotation, "apply", broken)
            for n in (1, 3, 8):
                for answer in await asyncio.gather(*(world.ask("oft") for _ in range(n))):
                    check_fault(answer, "engine_error")
        await world.check_right("oft")
    assert await world.count("model") > counted
    assert (await world.health())["status"] == "ok"
    await world.check_idle()


async def test_a_listener_that_fails_takes_no_event_from_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    router: OutputRouter = world.engine.loop.outputs._output_router
    put = router.put

    def with_a_bad_neighbour(request: Any, event: Any) -> None:
        def bad(event: Any) -> None:
            raise RuntimeError("bad listener")

        router._pending.append((request.loop, bad, event))
        put(request, event)

    await world.learn("lora")
    async with world.canary():
        monkeypatch.setattr(router, "put", with_a_bad_neighbour)
        await world.check_right("lora")
    await world.check_idle()


class Panic(BaseException):
    """A BaseException, as PyO3 raises for a panic in Rust."""


class FailingTokenizer:
    """The Rust tokenizer behind a fault."""

    def __init__(self, tokenizer: Any, fault: KthFault) -> None:
        self._tokenizer = tokenizer
        self._fault = fault

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        self._fault.pass_through()
        return self._tokenizer.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        self._fault.pass_through()
        return self._tokenizer.decode(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("error", [lambda: RuntimeError("/home/secret"), lambda: Panic("secret")])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_tokenizer_that_fails_at_any_call_fails_that_request_alone(
    stream: bool, error: Callable[[], BaseException], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.learn("lora")
    fault = KthFault(error)
    text = world.parts.text
    n_failed = 0
    for _ in fault.each_k():
        async with world.canary_that_runs():  # it has its tokenizer already
            with monkeypatch.context() as patch:
                patch.setattr(text, "backend", FailingTokenizer(text.backend, fault))
                answer = await world.ask("lora", prompt="other text", stream=stream)
        if answer.status_code != 200:
            check_fault(answer, "tokenizer_failed", "internal_error")
        elif stream:
            assert answer.text.rstrip().endswith("data: [DONE]")
        n_failed += "internal_error" in answer.text or "tokenizer_failed" in answer.text
        assert "secret" not in answer.text
        await world.check_idle()
    assert n_failed >= 3
    await world.check_right("lora")
    await world.check_idle()


async def test_an_encoder_that_fails_is_told_to_those_who_need_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"prompt": "Arr, matey, where be the treasure?"}
    assert (await world.ask("auto", **text)).status_code == 200
    encoder = world.encoder.get()
    fault = KthFault(lambda: RuntimeError("tensors of /home/secret"))
    monkeypatch.setattr(encoder._quick, "forward", fault.before(encoder._quick.forward))
    n_asked = 0
    async with world.canary():
        for _ in fault.each_k():
            n_asked += 1
            answer = await world.ask("auto", prompt=f"Where be the treasure, number {n_asked}?")
            if answer.status_code != 200:
                check_fault(answer, "encoder_unavailable")
                assert answer.status_code == 503
    always = KthFault(lambda: RuntimeError("secret"))
    with monkeypatch.context() as patch:
        for n in range(3):
            always.arm(0)
            patch.setattr(encoder._quick, "forward", always.before(encoder._quick.forward))
            check_fault(await world.ask("auto", prompt=f"still {n}"), "encoder_unavailable")
        assert (await world.health())["degraded"][0]["part"] == "encoder"
    assert (await world.ask("auto", prompt="at last")).status_code == 200
    assert (await world.health())["status"] == "ok"
    await world.check_idle()


async def test_a_generator_that_fails_at_any_operation_registers_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = KthFault(lambda: RuntimeError("matrix of /home/secret"))
    made = world.generator.generate
    monkeypatch.setattr(world.generator, "generate", fault.within(made))
    before = await world.listing()
    n_failed = 0
    async with world.canary():
        for k in count():
            body = {"description": f"to French, in way {k}", "probe": False}
            fault.arm(k)
            answer = await world.client.post("/v1/adapters/generate", json=body)
            if not fault.disarm():
                break
            n_failed += 1
            check_fault(answer, "generator_unavailable")
            assert await world.listing() == before
            assert (await world.ask({"description": body["description"]})).status_code == 200
            before = await world.listing()
    assert answer.status_code == 201
    assert n_failed >= 5
    await world.check_idle()
