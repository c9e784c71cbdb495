"""Times a decode step of a mixture of experts beside dense bases, all with random weights.

    python -m loadtests.parts.bench_moe_step [--rows 16] [--experts 16] [--top-k 4] [--out FILE]

``dense`` has an MLP as wide as the experts that one token chooses, so it has the same active
parameters. ``dense of all`` has an MLP as wide as all experts, so a step reads as many bytes as a
step of the mixture in which every expert has a row. The bases take turns. Prints and writes the
median step of each, the ratios to ``dense``, and the bytes of the MLPs that a step reads.
"""

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadtests.parts.decode_step import step_ms
from loraplex_server.engine.build import assemble_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.model.base_model import load_base_model

_VOCABULARY = 1024  # small: the head is no part of the question


def engines(options: argparse.Namespace, folder: Path) -> dict[str, Engine]:
    """Return an engine for each base, in bfloat16 on the CPU."""
    common = {
        "vocab_size": _VOCABULARY,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 256,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    experts = {
        "num_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "moe_intermediate_size": options.width,
        "norm_topk_prob": True,
    }
    bases = {
        "mixture": AutoConfig.for_model("qwen3_moe", **common, **experts),
        "dense": AutoConfig.for_model(
            "qwen3", **common, intermediate_size=options.top_k * options.width
        ),
        "dense of all": AutoConfig.for_model(
            "qwen3", **common, intermediate_size=options.experts * options.width
        ),
    }
    found = {}
    for name, config in bases.items():
        torch.manual_seed(0)
        path = folder / name
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        model = load_base_model(path, name, dtype=torch.bfloat16, device=torch.device("cpu"))
        found[name] = assemble_engine(
            model, EngineConfig(prefix_cache=False, drafts="off", threads=options.threads)
        )
    return found


def requests(n_rows: int, n_tokens: int) -> list[GenerationRequest]:
    """Return requests with random prompts, which draw ``n_tokens`` tokens each."""
    generator = torch.Generator().manual_seed(1)
    return [
        GenerationRequest(
            f"{time.monotonic_ns()}-{index}",
            tuple(torch.randint(_VOCABULARY, (16,), generator=generator).tolist()),
            SamplingParams(max_tokens=n_tokens, temperature=1.0, seed=index, ignore_eos=True),
            None,
        )
        for index in range(n_rows)
    ]


async def measure(found: dict[str, Engine], options: argparse.Namespace) -> dict[str, object]:
    for engine in found.values():
        await step_ms(engine, requests(options.rows, 12))  # warms up
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, engine in found.items():
            batch = requests(options.rows, options.tokens)
            times[name].append(await step_ms(engine, batch))
    medians = {name: statistics.median(values) for name, values in times.items()}
    expert_bytes = 3 * options.hidden * options.width * 2 * options.layers
    n_chosen = options.experts * (1 - (1 - options.top_k / options.experts) ** options.rows)
    return {
        "rows": options.rows,
        "experts": options.experts,
        "top_k": options.top_k,
        "hidden": options.hidden,
        "width": options.width,
        "layers": options.layers,
        "step_ms": {name: round(value, 2) for name, value in medians.items()},
        "all_ms": {name: [round(v, 2) for v in values] for name, values in times.items()},
        "mixture_over_dense": round(medians["mixture"] / medians["dense"], 3),
        "dense_of_all_over_dense": round(medians["dense of all"] / medians["dense"], 3),
        "mlp_mib_of_a_step": {  # random routers: every choice is equally likely
            "mixture": round(n_chosen * expert_bytes / 2**20, 1),
            "dense": round(options.top_k * expert_bytes / 2**20, 1),
            "dense of all": round(options.experts * expert_bytes / 2**20, 1),
        },
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--width", type=int, default=512, help="of an expert")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = engines(options, Path(folder))
        try:
            result = asyncio.run(measure(found, options))
        finally:
            for engine in found.values():
                engine.close()
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
