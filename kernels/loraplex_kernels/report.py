"""``python -m loraplex_kernels.report``: registers, shared memory and spills of every kernel.

Compiles every launch of every tuning row to sm_80 and sm_90 machine code and writes registers,
shared memory, occupancy and spills to ``docs/kernels-report.{md,json}``. Exits with 1 when a kernel
spills, exceeds the shared-memory budget or leaves the instruction family of its kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from loraplex_kernels.triton.aot import Resources, compile_launch
from loraplex_kernels.triton.launches import NamedLaunch, all_launches
from loraplex_kernels.triton.tuning import default_table

__all__ = ["SHARED_BUDGET", "CompiledLaunch", "compile_all", "find_faults", "sample"]

SHARED_BUDGET = 64 * 1024  # bytes of a block: at least two fit on an A100, three on an H100
CAPABILITIES = (80, 90)


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    named: NamedLaunch
    resources: Resources

    @property
    def kernel(self) -> str:
        return self.named.launch.kernel.rpartition(":")[2]


def sample(launches: Iterable[NamedLaunch]) -> list[NamedLaunch]:
    """The first and the last launch of every kernel and dtype, on alternating capabilities."""
    groups: dict[tuple[str, str], list[NamedLaunch]] = defaultdict(list)
    for named in launches:
        groups[named.launch.kernel, named.dtype].append(named)
    chosen: list[NamedLaunch] = []
    for group in groups.values():
        chosen.extend(dict.fromkeys((group[0], group[-1])))
    return chosen


def compile_all(launches: Sequence[NamedLaunch], *, n_processes: int) -> list[CompiledLaunch]:
    """Compiles in processes of their own; Triton's cache answers for what it has seen."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
        return list(pool.map(_compile, launches, chunksize=4))


def find_faults(compiled: Iterable[CompiledLaunch]) -> list[str]:
    """One line for each launch that spills, takes too much, or would sum in another order.

    The bits of a row are the same in all tiles only if all tiles use one matrix instruction. So the
    launches of one kernel, dtype and capability must agree, and none may use wgmma.
    """
    faults: list[str] = []
    families: dict[tuple[str, str, int], set[tuple[str, ...]]] = defaultdict(set)
    for one in compiled:
        place = f"{one.kernel} {one.named.dtype} sm_{one.named.capability} ({one.named.name})"
        if one.resources.spill_bytes:
            faults.append(f"{place} spills {one.resources.spill_bytes} bytes")
        if one.resources.shared_bytes > SHARED_BUDGET:
            faults.append(f"{place} takes {one.resources.shared_bytes} bytes of shared memory")
        families[one.kernel, one.named.dtype, one.named.capability].add(one.resources.instructions)
    for (kernel, dtype, capability), instructions in families.items():
        kinds = {kind for group in instructions for kind in group}
        if len(instructions) > 1 or any(kind.startswith("wgmma") for kind in kinds):
            faults.append(f"{kernel} {dtype} sm_{capability} mixes {sorted(kinds)}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="a few launches of each kernel")
    parser.add_argument("--output", type=Path, default=Path("docs/kernels-report"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    launches = all_launches(default_table(), CAPABILITIES)
    if arguments.sample:
        launches = sample(launches)
    compiled = compile_all(launches, n_processes=arguments.processes)
    faults = find_faults(compiled)
    arguments.output.with_suffix(".json").write_text(_as_json(compiled, faults), encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(_as_markdown(compiled, faults), encoding="utf-8")
    print(f"{len(compiled)} launches compiled, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


def _compile(named: NamedLaunch) -> CompiledLaunch:
    return CompiledLaunch(named, compile_launch(named.launch, named.capability))


def _as_json(compiled: Sequence[CompiledLaunch], faults: Sequence[str]) -> str:
    rows = [
        {
            "kernel": one.kernel,
            "for": one.named.name,
            "capability": one.named.capability,
            "dtype": one.named.dtype,
            "num_warps": one.named.launch.num_warps,
            "num_stages": one.named.launch.num_stages,
            "constants": {name: str(value) for name, value in one.named.launch.constants},
            **asdict(one.resources),
        }
        for one in compiled
    ]
    document = {"triton": triton.__version__, "faults": list(faults), "launches": rows}
    return json.dumps(document, indent=1) + "\n"


def _as_markdown(compiled: Sequence[CompiledLaunch], faults: Sequence[str]) -> str:
    lines = [
        "# GPU resources of the kernels",
        "",
        "Written by `make kernels-report`, which compiles every launch of every row of the tuning",
        f"table ahead of time (Triton {triton.__version__}, no GPU). Registers are per thread,",
        "shared memory and warps per block, blocks and occupancy per multiprocessor; spills are",
        "bytes of stack and local memory per thread.",
        "",
        f"{len(compiled)} launches, {len(faults)} faults"
        f" (spills, over {SHARED_BUDGET // 1024} KiB shared, mixed matrix instructions).",
        "",
        *(f"- {fault}" for fault in faults),
        "",
    ]
    header = (
        "| arch | dtype | for | tile | warps | registers | shared | spills | blocks | occupancy |"
    )
    for kernel in dict.fromkeys(one.kernel for one in compiled):
        own = [one for one in compiled if one.kernel == kernel]
        kinds = sorted({kind for one in own for kind in one.resources.instructions})
        lines += [f"## {kernel}", "", f"Matrix instructions: {', '.join(kinds) or 'none'}", ""]
        lines += [header, "| --- " * 10 + "|", *map(_as_row, own), ""]
    return "\n".join(lines)


def _as_row(one: CompiledLaunch) -> str:
    constants = dict(one.named.launch.constants)
    tile = " × ".join(
        f"{name[6:]}{constants[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        if name in constants
    )
    taken = one.resources
    return (
        f"| sm_{one.named.capability} | {one.named.dtype} | {one.named.name} | {tile or '–'} "
        f"| {one.named.launch.num_warps} | {taken.registers} | {taken.shared_bytes} "
        f"| {taken.spill_bytes} | {taken.blocks} | {taken.occupancy:.0%} |"
    )


if __name__ == "__main__":
    sys.exit(main())
