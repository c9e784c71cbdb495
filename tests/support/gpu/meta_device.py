"""Runs the engine's own code without values, with torch's ``meta`` device as its GPU.

What a GPU would punish becomes a finding: operators over tensors of two devices, the host waiting
for the device, host copies while a graph is captured, launches that CUDA would refuse. Kernels,
operators and copies are counted, and Triton's launchers run for real up to the launch itself.
What is copied to the host is zeros.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

META = torch.device("meta")
_CPU = torch.device("cpu")
# Operators that allocate, or only describe: no kernel runs.
_NO_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias"})
_POINTER_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64)
_MORE_DTYPES = (torch.float64, torch.uint8, torch.int8, torch.bool)
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Copy(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_pinned: bool  # the host's side
    waits: bool  # the host waits for it
    where: str  # file:line of ours

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Work:
    """A record of the calls to the device."""

    kernels: list[str] = field(default_factory=list)  # operators and launches, in order
    launches: list[str] = field(default_factory=list)  # of ours, by kernel
    grids: list[tuple[str, tuple[int, ...], Mapping[str, Any]]] = field(default_factory=list)
    copies_in: list[Copy] = field(default_factory=list)
    copies_out: list[Copy] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # where the host waited for an event or a stream
    findings: list[str] = field(default_factory=list)
    n_replays: int = 0
    replayed: list[str] = field(default_factory=list)  # kernels, by the replays
    n_captures: int = 0

    def counted(self) -> Counter[str]:
        return Counter(self.kernels)


class MetaGpu(TorchDispatchMode):
    """A recorder of the calling thread's calls to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.is_capturing = False
        self.current: list[object] = []  # devices that were made current, or asked about
        self.n_emptied = 0  # calls of ``empty_cache``
        self.variants: set[str] = set()  # of kernels, as Triton would compile them
        self.recorded: list[Work] = []  # what each graph launches
        self._pinned: dict[int, torch.UntypedStorage] = {}  # by address
        # Storages that exist by a recording, which says whether it ran; by identity.
        self._made: dict[int, tuple[object, _Graph]] = {}
        self.graph: _Graph | None = None  # that is captured now

    def take(self) -> Work:
        """Return the calls since the last ``take``."""
        work, self.work = self.work, Work()
        return work

    def find(self, what: str) -> None:
        self.work.findings.append(f"{_where()}: {what}")

    def wait(self, what: str) -> None:
        self.work.waits.append(f"{_where()}: {what}")
        if self.is_capturing:
            self.find(f"{what} while a graph is captured")

    def is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        if address in self._pinned:
            return True
        slabs = self._pinned.items()
        return any(first < address < first + storage.nbytes() for first, storage in slabs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name: str = func._schema.name.removeprefix("aten::")
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        special = getattr(self, f"_{name.strip('_')}", None)
        if special is not None:
            return self._note_made(special(func, args, kwargs), (args, kwargs))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            return self._pin(func(*args, **kwargs))
        self._note(func, name, args, kwargs)
        if name in ("addmm", "_sparse_addmm") and args[1].is_sparse:  # meta has no such product
            return args[0].new_empty(args[1].shape[0], args[2].shape[1])
        return self._note_made(func(*args, **kwargs), (args, kwargs))

    def _note_made(self, result: Any, given: Any) -> Any:
        """Memory allocated during a capture holds no values before the graph has run."""
        if self.graph is not None and isinstance(result, Tensor) and result.is_meta:
            storage = result.untyped_storage()
            old = {x.untyped_storage()._cdata for x in tree_leaves(given) if _is_plain_meta(x)}
            if storage._cdata not in old:
                self._made[storage._cdata] = storage, self.graph
        return result

    def launch(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a launch. Replaces Triton's launcher."""
        name = kernel.fn.__name__
        values = dict(zip(kernel.arg_names, args, strict=False)) | {
            key: value for key, value in kwargs.items() if key in kernel.arg_names
        }
        grid = kwargs["grid"]
        grid = tuple(grid(values)) if callable(grid) else tuple(grid)
        for size, limit in zip(grid, _GRID_LIMITS, strict=False):
            if not 0 < size <= limit:
                self.find(f"{name}: CUDA refuses the grid {grid}")
        strides = [argument for argument in values if argument.startswith("stride_")]
        for parameter in kernel.params:
            if parameter.name not in values:
                self.find(f"{name}: no value for {parameter.name}")
                continue
            self._check_argument(name, parameter, values[parameter.name], strides)
        self.variants.add(_variant(kernel, values, kwargs))
        self.work.launches.append(name)
        self.work.grids.append((name, grid, values))
        self.work.kernels.append(name)

    def _check_argument(
        self, name: str, parameter: Any, value: Any, strides: Sequence[str]
    ) -> None:
        where = f"{name}: {parameter.name}"
        if isinstance(value, Tensor) and value.is_meta and not self.is_capturing:
            _, graph = self._made.get(value.untyped_storage()._cdata, (None, None))
            if graph is not None and not graph.has_run:
                self.find(f"{where} is of a graph that has not run")
        if not isinstance(value, Tensor):
            if not parameter.is_constexpr and not isinstance(value, int | float):
                self.find(f"{where} is a {type(value).__name__}")
            return
        if parameter.is_constexpr:
            self.find(f"{where} is a tensor, and a constant of the kernel")
        if value.device.type != "meta":
            self.find(f"{where} is on the {value.device}")
        if value.dtype not in (*_POINTER_DTYPES, *_MORE_DTYPES):
            self.find(f"{where} is {value.dtype}")
        plain = value.is_contiguous() or (
            bool(strides) and value.dim() > 0 and (value.stride(-1) == 1 or value.shape[-1] == 1)
        )
        own = f"stride_{parameter.name[0]}"  # stride_bk of b_ptr
        is_told = sum(stride.startswith(own) for stride in strides) >= value.dim()
        if not (plain or is_told) and value.numel() > 0:
            self.find(f"{where} has strides {value.stride()}, which the kernel is not told")

    def _note(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.dim() > 0 or x.is_meta}
        if len(devices) > 1:
            self.find(f"{name} over tensors of two devices")
        on_device = "meta" in devices or kwargs.get("device") == META
        if on_device and not func.is_view and name not in _NO_KERNEL:
            self.work.kernels.append(name)

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage  # kept, or the address would be another's
        return tensor

    def _pin_memory(self, _func: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
        return self._pin(args[0].clone())

    def _local_scalar_dense(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args[0].is_meta:
            return func(*args, **kwargs)
        self.find("reads a value, so the host waits for the device")
        self._copied_out(args[0], is_pinned=False, waits=True)
        return 0.0 if args[0].dtype.is_floating_point else 0

    def _to_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        source = args[0]
        target = torch.device(kwargs.get("device") or source.device)
        if source.is_meta and target == _CPU:
            self._copied_out(source, is_pinned=False, waits=True)
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not source.is_meta and target.type == "meta":
            pinned = self.is_pinned(source)
            self._copied_in(source, pinned, waits=not (pinned and kwargs.get("non_blocking")))
        elif source.is_meta:
            self.work.kernels.append("_to_copy")
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        target, source = args[0], args[1]
        asked = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if source.is_meta and not target.is_meta:
            pinned = self.is_pinned(target)
            self._copied_out(source, pinned, waits=not (pinned and asked))
            return target.zero_()
        if target.is_meta and not source.is_meta and source.dim() > 0:
            pinned = self.is_pinned(source)
            self._copied_in(source, pinned, waits=not (pinned and asked))
        elif target.is_meta:
            self.work.kernels.append("copy_")
        return func(*args, **kwargs)

    def _detach(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if func._schema.name == "aten::detach_" and args[0].is_meta:
            self._copied_in(args[0], is_pinned=False, waits=True)  # torch.tensor([…], device=…)
        return func(*args, **kwargs)

    def _copied_in(self, tensor: Tensor, is_pinned: bool, *, waits: bool) -> None:
        self.work.copies_in.append(
            Copy(tuple(tensor.shape), tensor.dtype, is_pinned, waits, _where())
        )
        if self.is_capturing:
            self.find("a copy from the host while a graph is captured")

    def _copied_out(self, tensor: Tensor, is_pinned: bool, *, waits: bool) -> None:
        self.work.copies_out.append(
            Copy(tuple(tensor.shape), tensor.dtype, is_pinned, waits, _where())
        )
        if self.is_capturing:
            self.find("a copy to the host while a graph is captured")


class MetaEvent:
    def __init__(self, gpu: MetaGpu) -> None:
        self._gpu = gpu

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._gpu.wait("an event")


class _Stream:
    def __init__(self, gpu: MetaGpu) -> None:
        self.device = META
        self._gpu = gpu

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: MetaEvent) -> None: ...

    def record_event(self, event: MetaEvent | None = None) -> MetaEvent:
        return event or MetaEvent(self._gpu)

    def synchronize(self) -> None:
        self._gpu.wait("a stream")


class _Graph:
    def __init__(self, gpu: MetaGpu) -> None:
        self._gpu = gpu
        self.has_run = False
        self.captured: Work | None = None
        self._outside = Work()

    def capture_begin(self, **_: object) -> None:
        self._outside, self._gpu.work = self._gpu.work, Work()
        self._gpu.is_capturing, self._gpu.graph = True, self

    def capture_end(self) -> None:
        self._gpu.is_capturing, self._gpu.graph = False, None
        self.captured, self._gpu.work = self._gpu.work, self._outside
        self._gpu.work.n_captures += 1
        self._gpu.recorded.append(self.captured)
        self._gpu.work.findings += self.captured.findings

    def replay(self) -> None:
        if self.captured is None:
            self._gpu.find("replays a graph that was not captured")
        self.has_run = True
        self._gpu.work.n_replays += 1
        self._gpu.work.replayed += [] if self.captured is None else self.captured.kernels


def _cuda_stand_ins(
    gpu: MetaGpu, total_bytes: int, free_bytes: int, step_bytes: int
) -> Mapping[str, Any]:
    current = _Stream(gpu)

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        yield

    def note_device(device: object = None) -> None:
        gpu.current.append(device)

    @contextmanager
    def as_current(device: object) -> Iterator[None]:
        note_device(device)
        yield

    def mem_get_info(device: object = None) -> tuple[int, int]:
        note_device(device)
        return free_bytes, total_bytes

    def empty_cache() -> None:
        gpu.n_emptied += 1

    return {
        "is_available": lambda: True,
        "Stream": lambda *_, **__: _Stream(gpu),
        "Event": lambda *_, **__: MetaEvent(gpu),
        "current_stream": lambda *_: current,
        "stream": on_stream,
        "CUDAGraph": lambda: _Graph(gpu),
        "graph_pool_handle": lambda: (0, 0),
        "synchronize": lambda *_: gpu.wait("the device"),
        "set_device": note_device,
        "device": as_current,
        "device_count": lambda: 2,
        "empty_cache": empty_cache,
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda *_: 0,
        "get_device_capability": lambda *_: (9, 0),
        "max_memory_allocated": lambda *_: step_bytes,
        "reset_peak_memory_stats": lambda *_: None,
    }


@contextmanager
def meta_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    total_bytes: int = 80 << 30,
    free_bytes: int = 60 << 30,
    step_bytes: int = 1 << 30,
) -> Iterator[MetaGpu]:
    """Within the block, tensors on ``meta`` count as a GPU's on the calling thread."""
    gpu = MetaGpu()

    def run(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        gpu.launch(kernel, args, kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta), raising=False)
        patch.setattr(JITFunction, "run", run)
        for name, stand_in in _cuda_stand_ins(gpu, total_bytes, free_bytes, step_bytes).items():
            patch.setattr(torch.cuda, name, stand_in)
        with gpu:
            yield gpu


def _is_plain_meta(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_meta and x.layout is torch.strided


def _variant(kernel: JITFunction, values: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Return the compile key of a launch: constants, dtypes and divisibility of integers."""
    parts: list[object] = [kernel.fn.__name__]
    for parameter in kernel.params:
        value = values.get(parameter.name)
        if isinstance(value, Tensor):
            parts.append(value.dtype)
        elif parameter.is_constexpr:
            parts.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            parts.append((value == 1, value % 16 == 0))
        else:
            parts.append(type(value).__name__)
    parts += [(name, kwargs.get(name)) for name in ("num_warps", "num_stages", "maxnreg")]
    return repr(parts)


def _where() -> str:
    """Return the innermost frame of our code."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/loraplex_" in path:
            return f"{path.rpartition('/loraplex_')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
