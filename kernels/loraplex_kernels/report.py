"""``python -m loraplex_kernels.report``: registers, shared memory and spills of every kernel.

Compiles every launch of every tuning row to sm_80, sm_90 and sm_100 machine code and writes
registers, shared memory, occupancy and spills to ``docs/kernels-report.{md,json}``, and the least
time that each kernel can take. ``--kernels`` compiles some kernels alone and takes the others' rows
from the file. Exits with 1 when a kernel spills, exceeds the shared-memory budget or leaves the
instruction family of its kind.
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
from typing import Any, NamedTuple

import triton

from loraplex_kernels.roofline import deterministic_lines, roofline_lines
from loraplex_kernels.triton.aot import Resources, compile_launch
from loraplex_kernels.triton.launches import NamedLaunch, all_launches
from loraplex_kernels.triton.tuning import default_table

__all__ = ["SHARED_BUDGET", "CompiledLaunch", "compile_all", "find_faults", "sample"]

# Bytes of a block: two fit on a multiprocessor.
SHARED_BUDGET = {80: 81 * 1024, 90: 113 * 1024, 100: 113 * 1024}
CAPABILITIES = tuple(SHARED_BUDGET)
_STACK = 8  # bytes that ptxas for Blackwell takes where registers are free


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    named: NamedLaunch
    resources: Resources

    @property
    def kernel(self) -> str:
        return _kernel_of(self.named)


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
    launches of one kernel, dtype and capability must agree, but for those that promise nothing.
    """
    faults: list[str] = []
    families: dict[tuple[str, str, int], set[tuple[str, ...]]] = defaultdict(set)
    for one in compiled:
        place = f"{one.kernel} {one.named.dtype} sm_{one.named.capability} ({one.named.name})"
        if one.resources.spill_bytes > _STACK:
            faults.append(f"{place} spills {one.resources.spill_bytes} bytes")
        if one.resources.shared_bytes > SHARED_BUDGET[one.named.capability]:
            faults.append(f"{place} takes {one.resources.shared_bytes} bytes of shared memory")
        if one.named.batch_invariant:
            kind = one.kernel, one.named.dtype, one.named.capability
            families[kind].add(one.resources.instructions)
    for (kernel, dtype, capability), instructions in families.items():
        if len(instructions) > 1:
            kinds = {kind for group in instructions for kind in group}
            faults.append(f"{kernel} {dtype} sm_{capability} mixes {sorted(kinds)}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="a few launches of each kernel")
    parser.add_argument("--output", type=Path, default=Path("docs/kernels-report"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kernels", nargs="+", help="compile these; the file has the others")
    arguments = parser.parse_args()
    launches = all_launches(default_table(), CAPABILITIES)
    order = list(dict.fromkeys(_kernel_of(named) for named in launches))
    document = arguments.output.with_suffix(".json")
    kept = _Report([], [])
    if arguments.kernels:
        launches = [named for named in launches if _kernel_of(named) in arguments.kernels]
        kept = _read(document, arguments.kernels)
    if arguments.sample:
        launches = sample(launches)
    compiled = compile_all(launches, n_processes=arguments.processes)
    rows = sorted(
        [*kept.rows, *map(_as_dict, compiled)], key=lambda row: order.index(row["kernel"])
    )
    report = _Report(rows, [*kept.faults, *find_faults(compiled)])
    document.write_text(_as_json(report), encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(_as_markdown(report), encoding="utf-8")
    print(
        f"{len(compiled)} launches compiled, {len(report.faults)} faults", *report.faults, sep="\n"
    )
    return 1 if report.faults else 0


class _Report(NamedTuple):
    rows: list[dict[str, Any]]  # of the JSON file
    faults: list[str]


def _read(document: Path, anew: Sequence[str]) -> _Report:
    """What the file has of other kernels."""
    known = json.loads(document.read_text(encoding="utf-8"))
    if known["triton"] != triton.__version__:
        raise SystemExit(f"{document} was written with Triton {known['triton']}; compile all")
    return _Report(
        [row for row in known["launches"] if row["kernel"] not in anew],
        [fault for fault in known["faults"] if fault.partition(" ")[0] not in anew],
    )


def _kernel_of(named: NamedLaunch) -> str:
    return named.launch.kernel.rpartition(":")[2]


def _compile(named: NamedLaunch) -> CompiledLaunch:
    return CompiledLaunch(named, compile_launch(named.launch, named.capability))


def _as_dict(one: CompiledLaunch) -> dict[str, Any]:
    return {
        "kernel": one.kernel,
        "for": one.named.name,
        "capability": one.named.capability,
        "dtype": one.named.dtype,
        "num_warps": one.named.launch.num_warps,
        "num_stages": one.named.launch.num_stages,
        "constants": {name: str(value) for name, value in one.named.launch.constants},
        **asdict(one.resources),
    }


def _as_json(report: _Report) -> str:
    document = {"triton": triton.__version__, "faults": report.faults, "launches": report.rows}
    return json.dumps(document, indent=1) + "\n"


def _as_markdown(report: _Report) -> str:
    lines = [
        "# GPU resources of the kernels",
        "",
        "Written by `make kernels-report`, which compiles every launch of every row of the tuning",
        f"table ahead of time (Triton {triton.__version__}, no GPU). Registers are per thread,",
        "shared memory and warps per block, blocks and occupancy per multiprocessor; spills are",
        "bytes of stack and local memory per thread.",
        "",
        f"{len(report.rows)} launches, {len(report.faults)} faults"
        " (spills, shared memory of which two blocks do not fit on a multiprocessor, mixed matrix"
        " instructions).",
        "",
        *(f"- {fault}" for fault in report.faults),
        "",
        *roofline_lines(),
        *deterministic_lines(),
    ]
    header = (
        "| arch | dtype | for | tile | warps | registers | shared | spills | blocks | occupancy |"
    )
    for kernel in dict.fromkeys(row["kernel"] for row in report.rows):
        own = [row for row in report.rows if row["kernel"] == kernel]
        kinds = sorted({kind for row in own for kind in row["instructions"]})
        lines += [f"## {kernel}", "", f"Matrix instructions: {', '.join(kinds) or 'none'}", ""]
        lines += [header, "| --- " * 10 + "|", *map(_as_row, own), ""]
    return "\n".join(lines)


def _as_row(row: dict[str, Any]) -> str:
    constants = row["constants"]
    tile = " × ".join(
        f"{name[6:]}{constants[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        if name in constants
    )
    return (
        f"| sm_{row['capability']} | {row['dtype']} | {row['for']} | {tile or '–'} "
        f"| {row['num_warps']} | {row['registers']} | {row['shared_bytes']} "
        f"| {row['spill_bytes']} | {row['blocks']} | {row['occupancy']:.0%} |"
    )


if __name__ == "__main__":
    sys.exit(main())
