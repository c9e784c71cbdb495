"""Compiles the kernels ahead of time, for GPUs that this machine need not have.

A launcher runs on CPU tensors while ``JITFunction.run`` is replaced by a recorder; each recorded
launch is then compiled to machine code with the specialisations that Triton's own JIT would make
(16-byte pointers, divisible integers), and its resources are read from the cubin.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "Resources", "compile_launch", "record_launches"]

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# Per multiprocessor: registers, shared memory bytes, threads, blocks; and the shared memory that
# one block may use. From the CUDA programming guide's table of compute capabilities.
_LIMITS = {
    80: (65536, 164 * 1024, 2048, 32, 163 * 1024),
    90: (65536, 228 * 1024, 2048, 32, 227 * 1024),
    100: (65536, 228 * 1024, 2048, 32, 227 * 1024),
}

_MATRIX_INSTRUCTION = re.compile(r"\b(?:(?:wg)?mma\S*\.m\d+n\d+k\d+\S*|tcgen05\.mma\.cta\S*)")


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with everything that decides its machine code; equal ones compile once."""

    kernel: str  # module:function
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    max_registers: int | None  # of a thread; None = the compiler's choice


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes, for one capability."""

    registers: int  # a thread
    shared_bytes: int  # a block
    shared_limit: int  # that a block may use
    spill_bytes: int  # stack and local memory of a thread
    blocks: int  # that fit on a multiprocessor together
    occupancy: float  # resident threads over the most there can be
    instructions: tuple[str, ...]  # kinds of matrix instruction in its PTX


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within it, launches are noted instead of run. Not for interpreted kernels."""
    launches: list[Launch] = []

    def note(self: JITFunction, *args: object, **kwargs: object) -> None:
        launches.append(_describe(self, args, kwargs))

    run = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Machine code for ``capability`` (80, 90, 100), or Triton's cache of it."""
    kernel = _find(launch.kernel)
    names = list(dict(launch.signature))
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "maxnreg": launch.max_registers,
            "enable_fp_fusion": False,
        },
    )
    return _read_resources(
        compiled.asm["cubin"],
        compiled.asm["ptx"],
        shared_bytes=compiled.metadata.shared,
        n_threads=launch.num_warps * 32,
        capability=capability,
    )


def _describe(kernel: JITFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: kwargs[name] for name in kernel.arg_names if name in kwargs})
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, object]] = []
    divisible: list[int] = []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, _POINTERS[value.dtype]))
            divisible.append(i)
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        else:
            assert isinstance(value, int)
            signature.append((parameter.name, "i32"))
            if not parameter.do_not_specialize and value % 16 == 0:
                divisible.append(i)
    return Launch(
        kernel=f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        signature=tuple(signature),
        constants=tuple(constants),
        divisible=tuple(divisible),
        num_warps=int(str(kwargs.get("num_warps", 4))),
        num_stages=int(str(kwargs.get("num_stages", 3))),
        max_registers=int(str(kwargs["maxnreg"])) if "maxnreg" in kwargs else None,
    )


def _find(name: str) -> Callable[..., object]:
    module, _, function = name.partition(":")
    found: Callable[..., object] = getattr(__import__(module, fromlist=[function]), function)
    return found


def _read_resources(
    cubin: bytes, ptx: str, *, shared_bytes: int, n_threads: int, capability: int
) -> Resources:
    usage = _resource_usage(cubin)
    registers, shared, threads, most_blocks, shared_limit = _LIMITS[capability]
    # Registers are handed out to warps in units of 256.
    warp_registers = -(-usage["REG"] * 32 // 256) * 256
    n_warps = n_threads // 32
    blocks = min(
        most_blocks,
        threads // n_threads,
        registers // (warp_registers * n_warps),
        shared // (shared_bytes + 1024),
    )
    return Resources(
        registers=usage["REG"],
        shared_bytes=shared_bytes,
        shared_limit=shared_limit,
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        blocks=blocks,
        occupancy=blocks * n_threads / threads,
        instructions=tuple(sorted(set(_MATRIX_INSTRUCTION.findall(ptx)))),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
