"""Who gets how much of a GPU: a table of cards and models, asked without one."""

import math
from typing import NamedTuple

import pytest
import torch

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.defaults import host_tier_bytes, step_limits
from loraplex_server.engine.memory.memory_plan import MemoryPlan, MemoryProfile, plan_memory

GIB = 1 << 30
# Of a weight with its share of the scales: int4 has one of 16 bits for each 128.
WEIGHT_BITS = {"bf16": 16.0, "int8": 8.0, "fp8": 8.0, "int4": 4.125}


class Card(NamedTuple):
    name: str
    total_mib: int  # as nvidia-smi shows it


class Base(NamedTuple):
    """Parameters and shapes of the published configs."""

    name: str
    n_parameters: float
    n_layers: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    ff: int
    vocab: int
    n_heads: int
    tied: bool = False
    n_tables: float | None = None  # of the vocabulary; None: one if tied, else two

    def weights(self, quantization: str = "none") -> int:
        """Linears of the layers in ``quantization``, everything else in 16 bits."""
        heads = self.n_heads + 2 * self.n_kv_heads
        attention = self.hidden * self.head_dim * (heads + self.n_heads)
        linears = self.n_layers * (attention + 3 * self.hidden * self.ff)
        n_tables = self.n_tables or (1 if self.tied else 2)
        assert linears + n_tables * self.vocab * self.hidden == pytest.approx(
            self.n_parameters, rel=0.01
        )
        bits = WEIGHT_BITS["bf16" if quantization == "none" else quantization]
        return int(2 * (self.n_parameters - linears) + linears * bits / 8)

    @property
    def token_bytes(self) -> int:
        """Of the KV cache, in bfloat16."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * 2

    def step(self, n_tokens: int, n_requests: int) -> int:
        """The largest tensors that live at once: gate and up, their product, hidden states twice;
        or the logits of all requests, as the head gives them and in float32."""
        layers = n_tokens * (3 * self.ff + 3 * self.hidden) * 2
        logits = n_requests * self.vocab * (2 + 4) + n_tokens * self.hidden * 2
        return max(layers, logits)


T4, A10, L40S = Card("T4 16 GB", 15360), Card("A10 24 GB", 23028), Card("L40S 48 GB", 46068)
A100, H100, H200 = Card("A100 40 GB", 40960), Card("H100 80 GB", 81559), Card("H200", 143771)
SMOL = Base("SmolLM2-135M", 0.135e9, 30, 3, 64, 576, 1536, 49152, 9, tied=True)
LLAMA_1B = Base("Llama-3.2-1B", 1.24e9, 16, 8, 64, 2048, 8192, 128256, 32, tied=True)
LLAMA_8B = Base("Llama-3.1-8B", 8.03e9, 32, 8, 128, 4096, 14336, 128256, 32)
QWEN_32B = Base("Qwen2.5-32B", 32.8e9, 64, 8, 128, 5120, 27648, 152064, 40)
LLAMA_70B = Base("Llama-3.1-70B", 70.6e9, 80, 8, 128, 8192, 28672, 128256, 64)

CONTEXT = 512 << 20  # of CUDA and its libraries

# GiB of KV cache and adapters, and tokens of KV; None: it does not fit. As in docs/gpu.md.
TABLE: list[tuple[Card, Base, tuple[float, int] | None]] = [
    (T4, LLAMA_1B, (10.5, 275_000)),
    (T4, LLAMA_8B, None),
    (A10, LLAMA_8B, (4.6, 30_000)),
    (A100, LLAMA_8B, (20.3, 133_000)),
    (L40S, LLAMA_8B, (24.8, 163_000)),
    (H100, SMOL, (70.9, 2_642_000)),
    (H100, LLAMA_8B, (56.0, 367_000)),
    (H100, QWEN_32B, (9.7, 32_000)),
    (H100, LLAMA_70B, None),
    (H200, LLAMA_8B, (110.7, 725_000)),
    (H200, QWEN_32B, (64.4, 211_000)),
]


# The same with quantised linears.
QUANTIZED: list[tuple[Card, Base, str, tuple[float, int] | None]] = [
    (T4, LLAMA_8B, "int8", (4.3, 28_000)),
    (T4, LLAMA_8B, "int4", (7.5, 49_000)),
    (A10, LLAMA_8B, "int8", (11.1, 73_000)),
    (A10, LLAMA_8B, "int4", (14.2, 93_000)),
    (A100, QWEN_32B, "int8", (3.1, 10_000)),
    (A100, QWEN_32B, "int4", (17.2, 56_000)),
    (L40S, QWEN_32B, "int8", (7.6, 25_000)),
    (L40S, LLAMA_70B, "int4", None),
    (H100, LLAMA_8B, "fp8", (62.5, 410_000)),
    (H100, QWEN_32B, "fp8", (38.8, 127_000)),
    (H100, LLAMA_70B, "fp8", None),
    (H100, LLAMA_70B, "int4", (33.9, 89_000)),
    (H200, LLAMA_70B, "fp8", (57.7, 151_000)),
    (H200, LLAMA_70B, "int4", (88.6, 232_000)),
]


def planned(
    card: Card, base: Base, min_tokens: int = 8192, quantization: str = "none"
) -> MemoryPlan:
    config = EngineConfig()
    limits = step_limits(config, torch.device("cuda"))
    step = base.step(limits.max_step_tokens, limits.max_batch_size)
    profile = MemoryProfile(card.total_mib << 20, base.weights(quantization) + CONTEXT, step)
    return plan_memory(
        profile,
        utilization=config.gpu_memory_utilization,
        min_kv_bytes=min_tokens * base.token_bytes,
    )


@pytest.mark.parametrize(("card", "base", "wanted"), TABLE, ids=lambda v: getattr(v, "name", ""))
def test_what_a_card_leaves(card: Card, base: Base, wanted: tuple[float, int] | None) -> None:
    if wanted is None:
        with pytest.raises(ValueError, match="raise --gpu-memory-utilization"):
            planned(card, base)
        return
    plan = planned(card, base)
    assert (plan.kv_bytes + plan.adapter_bytes) / GIB == pytest.approx(wanted[0], abs=0.06)
    assert plan.kv_bytes / base.token_bytes == pytest.approx(wanted[1], abs=500)


@pytest.mark.parametrize(
    ("card", "base", "quantization", "wanted"), QUANTIZED, ids=lambda v: getattr(v, "name", None)
)
def test_what_a_card_leaves_beside_quantised_linears(
    card: Card, base: Base, quantization: str, wanted: tuple[float, int] | None
) -> None:
    if wanted is None:
        with pytest.raises(ValueError, match="raise --gpu-memory-utilization"):
            planned(card, base, quantization=quantization)
        return
    plan = planned(card, base, quantization=quantization)
    assert (plan.kv_bytes + plan.adapter_bytes) / GIB == pytest.approx(wanted[0], abs=0.06)
    assert plan.kv_bytes / base.token_bytes == pytest.approx(wanted[1], abs=500)


# The same of rank 0 of several cards, which also has the embedding. As in docs/tensor-parallel.md.
SHARED_TABLE: list[tuple[Card, int, Base, str, tuple[float, int] | None]] = [
    (L40S, 2, LLAMA_70B, "none", None),
    (L40S, 2, LLAMA_70B, "int4", (20.3, 107_000)),
    (L40S, 4, LLAMA_70B, "none", (5.4, 57_000)),
    (L40S, 4, LLAMA_70B, "fp8", (21.4, 224_000)),
    (A100, 2, LLAMA_70B, "int4", (15.8, 83_000)),
    (A100, 4, LLAMA_70B, "none", (0.9, 10_000)),
    (A100, 4, LLAMA_70B, "fp8", (16.9, 177_000)),
    (A100, 8, LLAMA_70B, "none", (17.1, 359_000)),
    (H100, 2, LLAMA_70B, "none", (4.2, 22_000)),
    (H100, 2, LLAMA_70B, "fp8", (36.1, 189_000)),
    (H100, 4, LLAMA_70B, "none", (36.6, 384_000)),
    (H100, 4, LLAMA_70B, "fp8", (52.6, 551_000)),
    (H100, 8, LLAMA_70B, "none", (52.8, 1_108_000)),
    (H200, 2, LLAMA_70B, "none", (58.9, 309_000)),
]


def rank_0(base: Base, n_ranks: int) -> Base:
    """Its part as a base of its own: widths divided, the embedding whole, the head in parts."""
    table = base.vocab * base.hidden
    n_parameters = (base.n_parameters - table) / n_ranks + table
    return base._replace(
        n_parameters=n_parameters,
        n_heads=base.n_heads // n_ranks,
        n_kv_heads=base.n_kv_heads // n_ranks,
        ff=base.ff // n_ranks,
        n_tables=1 + 1 / n_ranks,
    )


@pytest.mark.parametrize(
    ("card", "n_ranks", "base", "quantization", "wanted"),
    SHARED_TABLE,
    ids=lambda v: getattr(v, "name", None),
)
def test_what_several_cards_leave(
    card: Card, n_ranks: int, base: Base, quantization: str, wanted: tuple[float, int] | None
) -> None:
    part = rank_0(base, n_ranks)
    if wanted is None:
        with pytest.raises(ValueError, match="raise --gpu-memory-utilization"):
            planned(card, part, quantization=quantization)
        return
    plan = planned(card, part, quantization=quantization)
    assert (plan.kv_bytes + plan.adapter_bytes) / GIB == pytest.approx(wanted[0], abs=0.06)
    assert plan.kv_bytes / part.token_bytes == pytest.approx(wanted[1], abs=500)


def test_eight_billion_parameters_leave_fifty_gib_of_an_h100() -> None:
    plan = planned(H100, LLAMA_8B)
    assert plan.kv_bytes + plan.adapter_bytes >= 50 * GIB


PROFILE = MemoryProfile(total=100 * GIB, taken=20 * GIB, step=10 * GIB)  # leaves 60 at 0.9


def test_both_share_what_is_left() -> None:
    plan = plan_memory(PROFILE, utilization=0.9)
    assert plan.kv_bytes + plan.adapter_bytes == 60 * GIB
    assert plan.adapter_bytes == 12 * GIB


def test_what_is_asked_for_is_given_and_the_other_gets_the_rest() -> None:
    assert plan_memory(PROFILE, utilization=0.9, kv_bytes=50 * GIB) == MemoryPlan(
        50 * GIB, 10 * GIB
    )
    assert plan_memory(PROFILE, utilization=0.9, adapter_bytes=1 * GIB) == MemoryPlan(
        59 * GIB, 1 * GIB
    )
    both = plan_memory(PROFILE, utilization=0.9, kv_bytes=GIB, adapter_bytes=2 * GIB)
    assert both == MemoryPlan(GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kv_bytes": 61 * GIB}, "--kv-memory and --adapter-memory take 62,464 MiB together"),
        ({"adapter_bytes": 60 * GIB, "min_kv_bytes": 1}, "the KV cache would get 0 MiB"),
        ({"min_kv_bytes": 49 * GIB}, "one request of full length takes 50,176 MiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(asked: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        plan_memory(PROFILE, utilization=0.9, **asked)
    assert "90% of 102,400 MiB, less 20,480 MiB" in str(refused.value)


def test_defaults_follow_the_device_and_what_is_given_stays() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert step_limits(EngineConfig(), cpu) == (64, 128, 64, 0.08)
    assert step_limits(EngineConfig(max_loras=7), gpu) == (256, 2048, 7, math.inf)
    assert host_tier_bytes(cpu) == 2 * GIB
    assert 2 * GIB <= host_tier_bytes(gpu) <= 64 * GIB
