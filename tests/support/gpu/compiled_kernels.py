"""Compiles the Triton kernels ahead of time, for GPUs that this machine need not have.

A launcher runs on CPU tensors while ``JITFunction.run`` is replaced by a recorder. Each recorded
launch is then compiled to machine code with the specialisations that Triton's own JIT would make
(16-byte pointers, divisible integers), and its resources are read from the cubin.

``python -m tests.support.gpu.compiled_kernels`` compiles every launch of ``kernel_launches`` and
prints the faults, then a JSON line for each kernel, dtype and GPU. Arguments choose dtypes, such as
``bf16``.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
# Bytes of a block so that two blocks fit on a multiprocessor.
_SHARED_BUDGET = {80: 81 * 1024, 90: 113 * 1024, 100: 113 * 1024}
_STACK = 8  # bytes that ptxas for Blackwell takes where registers are free
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
_MATRIX_INSTRUCTION = re.compile(r"\b(?:(?:wg)?mma\S*\.m\d+n\d+k\d+\S*|tcgen05\.mma\.cta\S*)")


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that decides its machine code. Equal launches compile once."""

    kernel: str  # module:function
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    max_registers: int | None  # of a thread; None = the compiler's choice


@dataclass(frozen=True, slots=True)
class NamedLaunch:
    name: str  # the problem that it is for
    capability: int
    dtype: str
    launch: Launch
    batch_invariant: bool = True  # it sums in the order of the kernel's other launches

    @property
    def kernel(self) -> str:
        return self.launch.kernel.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a compiled kernel, for one capability."""

    registers: int  # a thread
    shared_bytes: int  # a block
    spill_bytes: int  # stack and local memory of a thread
    instructions: tuple[str, ...]  # kinds of matrix instruction in its PTX


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    named: NamedLaunch
    resources: Resources


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within the context, launches are recorded instead of run. Not for interpreted kernels."""
    launches: list[Launch] = []

    def note(self: JITFunction, *args: object, **kwargs: object) -> None:
        launches.append(_describe(self, args, kwargs))

    run = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_all(launches: Sequence[NamedLaunch], *, n_processes: int = 1) -> list[CompiledLaunch]:
    """Compile the launches; Triton's cache answers for launches that were compiled before."""
    if n_processes == 1:
        return [_compile(named) for named in launches]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
        return list(pool.map(_compile, launches, chunksize=4))


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile to machine code for ``capability`` (80, 90, 100), or take it from Triton's cache."""
    compiled = _compiled(launch, capability)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        shared_bytes=compiled.metadata.shared,
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        instructions=tuple(sorted(set(_MATRIX_INSTRUCTION.findall(compiled.asm["ptx"])))),
    )


def count_instructions(launch: Launch, capability: int) -> int:
    """Return how many instructions the machine code has, loops once."""
    code = _run_tool("nvdisasm", _compiled(launch, capability).asm["cubin"], "--print-code")
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))


def _compiled(launch: Launch, capability: int) -> CompiledKernel:
    kernel = _find(launch.kernel)
    names = list(dict(launch.signature))
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "maxnreg": launch.max_registers,
            "enable_fp_fusion": False,
        },
    )


def find_faults(compiled: Iterable[CompiledLaunch]) -> list[str]:
    """Return a line for each launch that spills, takes too much or sums in another order.

    A row has the same bits in all tiles only if all tiles use one matrix instruction. So the
    launches of one kernel, dtype and capability must agree, unless they promise no equal bits.
    """
    faults: list[str] = []
    families: dict[tuple[str, str, int], set[tuple[str, ...]]] = defaultdict(set)
    for one in compiled:
        named, resources = one.named, one.resources
        label = f"{named.kernel} {named.dtype} sm_{named.capability} ({named.name})"
        if resources.spill_bytes > _STACK:
            faults.append(f"{label} spills {resources.spill_bytes} bytes")
        if resources.shared_bytes > _SHARED_BUDGET[named.capability]:
            faults.append(f"{label} takes {resources.shared_bytes} bytes of shared memory")
        if named.batch_invariant:
            families[named.kernel, named.dtype, named.capability].add(resources.instructions)
    for (kernel, dtype, capability), instructions in families.items():
        if len(instructions) > 1:
            kinds = {kind for group in instructions for kind in group}
            faults.append(f"{kernel} {dtype} sm_{capability} mixes {sorted(kinds)}")
    return faults


def _compile(named: NamedLaunch) -> CompiledLaunch:
    return CompiledLaunch(named, compile_launch(named.launch, named.capability))


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
    kernel: Callable[..., object] = getattr(__import__(module, fromlist=[function]), function)
    return kernel


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _run_tool("cuobjdump", cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _run_tool(name: str, cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, *options, file.name], check=True, capture_output=True, text=True
        ).stdout


def summarise(compiled: Iterable[CompiledLaunch]) -> Iterator[dict[str, object]]:
    """Yield the most of each resource that the launches of a kernel take, by dtype and GPU."""
    groups: dict[tuple[str, str, int], list[Resources]] = defaultdict(list)
    for one in compiled:
        key = one.named.kernel, one.named.dtype, one.named.capability
        groups[key].append(one.resources)
    for (kernel, dtype, capability), group in sorted(groups.items()):
        yield {
            "kernel": kernel,
            "dtype": dtype,
            "capability": capability,
            "launches": len(group),
            "registers": max(each.registers for each in group),
            "shared_bytes": max(each.shared_bytes for each in group),
            "spill_bytes": max(each.spill_bytes for each in group),
            "instructions": sorted({kind for each in group for kind in each.instructions}),
        }


def main(dtypes: Sequence[str]) -> int:
    from tests.support.gpu.kernel_launches import all_launches  # it imports this module

    launches = [named for named in all_launches() if not dtypes or named.dtype in dtypes]
    compiled = compile_all(launches, n_processes=os.cpu_count() or 1)
    faults = find_faults(compiled)
    print(f"Triton {triton.__version__}: {len(compiled)} launches, {len(faults)} faults")
    print(*faults, sep="\n", end="\n" if faults else "")
    for row in summarise(compiled):
        print(json.dumps(row))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
