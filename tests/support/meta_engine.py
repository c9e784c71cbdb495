"""An engine whose model lies on the stand-in for a GPU, run step by step on the test's thread."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels import packed_linear, quantized_panels
from loraplex_kernels.quantized_weight import WeightFormat
from loraplex_server.engine import build, device_pool, model_runner
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.device import use_device
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.engine_loop import EngineLoop
from loraplex_server.engine.events import TokenEvent
from loraplex_server.engine.pooling import Pooling
from loraplex_server.engine.sampling_params import SamplingParams
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.quantized_modules import quantize_linears
from tests.support.engines import GREEDY, Answer, PlanLease
from tests.support.meta_device import META, MetaGpu, Work, meta_gpu

__all__ = ["MetaEngine", "Wish", "base_on_host", "meta_engine", "on_meta"]

SMALL = EngineConfig(
    kv_memory_bytes=1 << 20,
    adapter_memory_bytes=8 << 20,
    max_loras=32,
    max_batch_size=8,
    cuda_graph_tokens=64,
)


@dataclass(frozen=True)
class Wish:
    """A request of a test."""

    plan: AdapterPlan | None = None
    prompt: tuple[int, ...] = (5, 9, 20, 31, 7)
    sampling: SamplingParams = GREEDY
    pooling: Pooling | None = None


@dataclass
class Run:
    """What became of some requests."""

    steps: list[Work] = field(default_factory=list)  # loads of adapters excepted
    answers: list[Answer] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)  # of steps and of loads

    @property
    def findings(self) -> list[str]:
        return [what for step in self.steps for what in step.findings]

    @property
    def decode_steps(self) -> list[Work]:
        """Those behind the prefill, while nothing is loaded. The last turn only waits for ids."""
        return self.steps[1:-1]


class _Faults:
    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def failed(self, _part: str, error: Exception) -> None:
        self.errors.append(error)

    def worked(self, _part: str) -> None: ...


class _Inline:
    """The loader's thread: at once, on the caller's."""

    def __init__(self, gpu: MetaGpu, loads: Work) -> None:
        self._gpu, self._loads = gpu, loads

    def begin(
        self, *_: object, initializer: Callable[..., None], initargs: tuple[Any, ...], **__: object
    ) -> _Inline:
        initializer(*initargs)
        return self

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        outside, self._gpu.work = self._gpu.work, self._loads
        try:
            done.set_result(work(*args))
        except BaseException as error:
            done.set_exception(error)
        finally:
            self._gpu.work = outside
        return done

    def shutdown(self, **_: object) -> None: ...


class MetaEngine:
    def __init__(self, loop: EngineLoop, engine: Engine, gpu: MetaGpu, faults: _Faults) -> None:
        self.loop, self.gpu = loop, gpu
        self.loads = Work()  # what the loader asked of the device
        self._engine, self._faults = engine, faults

    def run(self, wishes: Sequence[Wish]) -> Run:
        """All at once, until each has ended."""
        return asyncio.run(self._run(wishes))

    async def _run(self, wishes: Sequence[Wish]) -> Run:
        run = Run(answers=[Answer() for _ in wishes])
        n_errors = len(self._faults.errors)
        for index, wish in enumerate(wishes):
            plan = None if wish.plan is None else self._engine.packer.prepare(wish.plan)
            request = GenerationRequest(
                f"r{index}",
                wish.prompt,
                wish.sampling,
                None if plan is None else PlanLease(plan),
                pooling=wish.pooling,
            )
            self._engine.submit(request, _listener(run.answers[index]))
        while any(not a.events or a.finish is None for a in run.answers):
            self.gpu.take()
            self.loop._step()
            run.steps.append(self.gpu.take())
            await asyncio.sleep(0)
            assert len(run.steps) < 200, "the requests do not end"
        run.errors = self._faults.errors[n_errors:]
        return run


def _listener(answer: Answer) -> Callable[[TokenEvent], None]:
    def listen(event: TokenEvent) -> None:
        answer.events.append(event)
        answer.token_ids += event.token_ids

    return listen


def base_on_host(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fuse: bool = True,
    quantization: WeightFormat | None = None,
) -> BaseModel:
    """Built of values, as the start of a server needs them, with weights as a GPU holds them."""
    with monkeypatch.context() as patch:
        for module in (packed_linear, quantized_panels):
            patch.setattr(module, "dtype_code", lambda _: None)
        own = copy.deepcopy(model).to(torch.bfloat16)
        if quantization is not None:
            quantize_linears(own, quantization, own.device)
        return BaseModel(own, "tiny", fuse=fuse, self_check=False)


def on_meta(base: BaseModel, device: torch.device = META) -> BaseModel:
    """A copy whose tensors have shapes alone. Its spec goes on reading the original's values."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor, memo: dict[int, object]) -> Tensor:
        if id(tensor) not in moved:
            shape = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META
            )
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(shape, requires_grad=False) if is_parameter else shape
        memo[id(tensor)] = moved[id(tensor)]
        return moved[id(tensor)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", move)
        patch.setattr(nn.Parameter, "__deepcopy__", move)
        copied = copy.deepcopy(base, {id(base.spec): base.spec})
    copied.device = device
    return copied


def _at_once(work: Callable[[], Any], device: torch.device) -> Any:
    use_device(device)
    return work()


@contextmanager
def meta_engine(
    base: BaseModel,
    monkeypatch: pytest.MonkeyPatch,
    *,
    device: torch.device = META,
    compiles: bool = False,  # at start, as a server does
    shard_workers: Any = None,  # a stand-in, of a base that is cut
    **changes: object,
) -> Iterator[MetaEngine]:
    """Around a copy of ``base``; ``changes`` are fields of the config. Warmed up, not started."""
    faults, loads = _Faults(), Work()
    config = SMALL.model_copy(update={"cuda_graphs": False, **changes})
    with monkeypatch.context() as patch, meta_gpu(monkeypatch) as gpu:
        patch.setattr(device_pool, "ThreadPoolExecutor", _Inline(gpu, loads).begin)
        patch.setattr(build, "_run_in_temp_thread", _at_once)
        patch.setattr(Engine, "start", lambda _: None)
        engine = build.assemble_engine(
            on_meta(base, device), config, faults=faults, shard_workers=shard_workers
        )
        if not compiles:
            patch.setattr(model_runner, "run_every_size", lambda *_, **__: None)
        with engine.loop.arithmetic:  # of its thread
            engine.loop.runner.warm_up(engine.loop._scheduler.max_step_tokens)
            meta = MetaEngine(engine.loop, engine, gpu, faults)
            meta.loads = loads
            yield meta
