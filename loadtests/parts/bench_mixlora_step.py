"""Times a decode step of 16 rows: a MixLoRA, a plain LoRA on all linears, and the base.

    python -m loadtests.parts.bench_mixlora_step [--rows 16] [--out FILE]

The engine, the default base, rank 16, 8 experts, top-2; kinds take turns, so that a slower minute
of the machine slows all of them. Prints and writes the median step of each and their ratios.
"""

import argparse
import asyncio
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from loadtests.parts.decode_step import step_ms
from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, Family, ModulePlan, RoutingStrategy
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.model.loading.pull import resolve_model

RANK, N_EXPERTS, TOP_K = 16, 8, 2
MLP = ("gate_proj", "up_proj", "down_proj")


class Lease:
    def __init__(self, plan: AdapterPlan) -> None:
        self.plan, self.digest = plan, plan.digest


def plans(spec: BaseSpec) -> dict[str, AdapterPlan | None]:
    """Return the plans by kind. None adapts the output head."""
    shapes = {name: shape for name, shape in spec.modules.items() if name != spec.output_head}
    g = torch.Generator().manual_seed(0)

    def factors(name: str) -> ModulePlan:
        b = torch.randn(shapes[name].out_features, RANK, generator=g) * 1e-3
        a = torch.randn(RANK, shapes[name].in_features, generator=g) * 1e-2
        return ModulePlan(a=a, b=b)

    blocks: dict[str, list[str]] = {}
    for name in shapes:
        if name.rpartition(".")[2] in MLP:
            blocks.setdefault(name.rpartition(".")[0], []).append(name)
    experts = {
        block: ExpertPlan(
            gate=torch.randn(N_EXPERTS, shapes[f"{block}.gate_proj"].in_features, generator=g),
            strategy=RoutingStrategy.TOP_K,
            top_k=TOP_K,
            top_p=0.0,
            experts=tuple({name: factors(name) for name in names} for _ in range(N_EXPERTS)),
        )
        for block, names in blocks.items()
    }
    attention = {n: factors(n) for n in shapes if n.rpartition(".")[0] not in blocks}
    return {
        "base": None,
        "lora": AdapterPlan("1" * 64, Family.LORA, {name: factors(name) for name in shapes}),
        "mixlora": AdapterPlan("2" * 64, Family.MIXLORA, attention, experts),
    }


def requests(plan: AdapterPlan | None, n_rows: int, n_tokens: int) -> list[GenerationRequest]:
    """Return greedy requests for ``n_tokens`` tokens each, all through one adapter or none."""
    return [
        GenerationRequest(
            f"{time.monotonic_ns()}-{index}",
            tuple(100 + 7 * index + j for j in range(16)),
            SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True),
            None if plan is None else Lease(plan),
        )
        for index in range(n_rows)
    ]


async def measure(
    engine: Engine, kinds: dict[str, AdapterPlan | None], n_rows: int, n_rounds: int, n_tokens: int
) -> dict[str, object]:
    for plan in kinds.values():
        await step_ms(engine, requests(plan, n_rows, 12))  # loads and warms up
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(n_rounds):
        for kind, plan in kinds.items():
            times[kind].append(await step_ms(engine, requests(plan, n_rows, n_tokens)))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "rows": n_rows,
        "rank": RANK,
        "experts": N_EXPERTS,
        "top_k": TOP_K,
        "step_ms": {kind: round(value, 2) for kind, value in medians.items()},
        "all_ms": {kind: [round(v, 2) for v in values] for kind, values in times.items()},
        "mixlora_over_lora": round(medians["mixlora"] / medians["lora"], 3),
        "lora_over_base": round(medians["lora"] / medians["base"], 3),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    built = build_engine(EngineConfig(prefix_cache=False, drafts="off"), resolve_model())
    try:
        result = asyncio.run(
            measure(
                built.engine, plans(built.base_spec), options.rows, options.rounds, options.tokens
            )
        )
    finally:
        built.engine.close()
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
