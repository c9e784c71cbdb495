"""An engine on the stand-in for a GPU, run step by step on the test's thread."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_kernels.layers import packed_linear
from loraplex_kernels.layers.quantized_linear import QuantizedLinear
from loraplex_server.engine import build
from loraplex_server.engine.adapters import adapter_loader
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.engine_loop import EngineLoop
from loraplex_server.engine.memory.device import use_device
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import TokenEvent
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.steps import model_runner
from loraplex_server.model import packing
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.encoder.encoder import Encoder
from loraplex_server.model.layers import packed_experts
from loraplex_server.model.quantized.quantized_modules import quantize_linears
from loraplex_server.model.vision.prompt_image import PromptImage
from tests.support.gpu.meta_device import META, MetaGpu, Work, meta_gpu
from tests.support.servers.engines import GREEDY, Answer, PlanLease

_Base = TypeVar("_Base", BaseModel, Encoder)
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
    images: tuple[PromptImage, ...] = ()
    pixels: Tensor | None = None  # of an image, whose rows the prompt counts


@dataclass
class Run:
    """The outcome of some requests."""

    steps: list[Work] = field(default_factory=list)  # loads of adapters excepted
    answers: list[Answer] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)  # of steps and of loads

    @property
    def findings(self) -> list[str]:
        return [what for step in self.steps for what in step.findings]

    @property
    def decode_steps(self) -> list[Work]:
        """Return the decode steps without loads. The last turn only waits for ids."""
        return self.steps[1:-1]


class _Failures(logging.Handler):
    """A log handler that collects the errors of records that name a part of the server."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []

    def __enter__(self) -> None:
        logging.getLogger().addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "part"):
            arguments = record.exc_info or record.args or ()
            self.errors += [each for each in arguments if isinstance(each, Exception)]


class _Inline:
    """A loader that works at once on the caller's thread."""

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
    def __init__(self, loop: EngineLoop, engine: Engine, gpu: MetaGpu, failures: _Failures) -> None:
        self.loop, self.gpu = loop, gpu
        self.loads = Work()  # what the loader asked of the device
        self._engine, self._failures = engine, failures

    def run(self, wishes: Sequence[Wish]) -> Run:
        """Run all requests together until each has ended."""
        return asyncio.run(self._run(wishes))

    async def _run(self, wishes: Sequence[Wish]) -> Run:
        run = Run(answers=[Answer() for _ in wishes])
        n_errors = len(self._failures.errors)
        for index, wish in enumerate(wishes):
            plan = None if wish.plan is None else self._engine.packer.prepare(wish.plan)
            request = GenerationRequest(
                f"r{index}",
                wish.prompt,
                wish.sampling,
                None if plan is None else PlanLease(plan),
                pooling=wish.pooling,
                images=wish.images,
                pixels=wish.pixels,
            )
            self._engine.submit(request, _listener(run.answers[index]))
        while any(not a.events or a.finish is None for a in run.answers):
            self.gpu.take()
            self.loop._step()
            run.steps.append(self.gpu.take())
            await asyncio.sleep(0)
            assert len(run.steps) < 200, "the requests do not end"
        run.errors = self._failures.errors[n_errors:]
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
    """Build the model with values, which a server's start needs, and weights as on a GPU."""
    with monkeypatch.context() as patch:
        hold_weights_as_on_a_gpu(patch)
        own = copy.deepcopy(model).to(torch.bfloat16)
        if quantization is not None:
            quantize_linears(own, quantization, own.device)
        return BaseModel(own, "tiny", fuse=fuse, self_check=False)


def hold_weights_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Make linears that are packed on the host hold plain weights or codes, no native panels."""
    patch.setattr(packed_linear, "dtype_code", lambda _: None)
    patch.setattr(packed_experts, "dtype_code", lambda _: None)  # the experts stay transformers'
    patch.setattr(packing, "coded_linear", QuantizedLinear)


def on_meta(base: _Base, device: torch.device = META) -> _Base:
    """Return a copy with tensors on ``meta``. Its spec still reads the original's values."""
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
    base: BaseModel | Encoder,
    monkeypatch: pytest.MonkeyPatch,
    *,
    device: torch.device = META,
    compiles: bool = False,  # at start, as a server does
    shard_workers: Any = None,  # a stand-in, of a base that is cut
    **changes: object,
) -> Iterator[MetaEngine]:
    """Build an engine on a copy of ``base``, warmed up but not started."""
    failures, loads = _Failures(), Work()
    config = SMALL.model_copy(update={"cuda_graphs": False, **changes})
    with monkeypatch.context() as patch, meta_gpu(monkeypatch) as gpu, failures:
        patch.setattr(adapter_loader, "ThreadPoolExecutor", _Inline(gpu, loads).begin)
        patch.setattr(build, "_run_in_temp_thread", _at_once)
        patch.setattr(Engine, "start", lambda _: None)
        engine = build.assemble_engine(on_meta(base, device), config, shard_workers=shard_workers)
        if not compiles:
            patch.setattr(model_runner, "run_every_size", lambda *_, **__: None)
        with engine.loop.settings.arithmetic:  # of its thread
            engine.loop.runner.warm_up(engine.loop._scheduler.max_step_tokens)
            meta = MetaEngine(engine.loop, engine, gpu, failures)
            meta.loads = loads
            yield meta
