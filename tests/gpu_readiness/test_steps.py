"""What a step asks of a GPU: launches a layer, copies in and out, and no wait but for the ids."""

import dataclasses
import logging
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loraplex_adapter_store.plan import (
    AdapterPlan,
    Family,
    NormPlan,
    PoolingMode,
    PrefixPlan,
    RoutingStrategy,
)
from loraplex_kernels.triton import attention, moe
from loraplex_kernels.triton import lora as triton_lora
from loraplex_server.engine.adapters import expert_monitor
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.model.base_model import BaseModel
from tests.gpu_readiness.conftest import BaseOf
from tests.support.adapters.routed_plans import (
    lora_plan,
    mixdora_plan,
    mixlora_plan,
    projection_plan,
    scaled_plan,
    scaled_slices_plan,
)
from tests.support.bases.architectures import ARCHITECTURES, tiny_model
from tests.support.gpu.meta_device import META, Copy, Work, meta_gpu
from tests.support.gpu.meta_engine import Run, Wish, meta_engine
from tests.support.servers.engines import GREEDY

SHORT = dataclasses.replace(GREEDY, max_tokens=4)
MODEL = tiny_model("llama")
LORA, OTHER_LORA = lora_plan(MODEL, rank=4, seed=1), lora_plan(MODEL, rank=20, seed=2)
ROUTED = {
    "mixlora": mixlora_plan(MODEL, n_experts=4, top_k=2, rank=4, seed=3),
    "mixlora-dynamic": mixlora_plan(
        MODEL, n_experts=4, top_k=2, rank=4, seed=4, strategy=RoutingStrategy.TOP_P
    ),
    "mixlora-switch": mixlora_plan(
        MODEL, n_experts=4, top_k=1, rank=4, seed=5, strategy=RoutingStrategy.SWITCH
    ),
    "mola": projection_plan(MODEL, n_experts=3, top_k=2, ranks=(2, 4), seed=6),
    "loramoe": projection_plan(
        MODEL, n_experts=3, top_k=2, ranks=(4,), seed=7, strategy=RoutingStrategy.DENSE
    ),
    "mixdora": mixdora_plan(MODEL, n_experts=3, top_k=2, rank=4, seed=12),
    "arrow": projection_plan(
        MODEL, n_experts=3, top_k=2, ranks=(4,), seed=8, strategy=RoutingStrategy.ARROW
    ),
}
NORM = AdapterPlan(
    "6" * 64,
    Family.LN_TUNING,
    {},
    norms={"model.layers.0.input_layernorm": NormPlan(torch.ones(MODEL.config.hidden_size))},
)
MIXED = [ROUTED["mola"], ROUTED["mixdora"], scaled_slices_plan(MODEL, seed=11, rank=4), LORA]
MIXTURES: dict[str, list[AdapterPlan | None]] = {
    "base": [None, None],
    "lora": [LORA, OTHER_LORA],
    "lora and base": [LORA, None, OTHER_LORA],
    "scales of inputs": [scaled_plan(MODEL, seed=10), LORA, None],
    "scales of slices": [scaled_slices_plan(MODEL, seed=11, rank=4), LORA, None],
    **{name: [plan, LORA, None] for name, plan in ROUTED.items()},
    "all routed": [
        *(ROUTED[name] for name in ROUTED if name != "mixdora"),
        scaled_plan(MODEL, seed=10),
        None,
    ],
    "all": [*MIXED, None],
    "a norm of its own": [NORM, ROUTED["mixlora"], None],
}

# With graphs these run in two forwards: captured layers do not compute some of their rows.
SPLIT = MIXTURES.keys() - {"base", "lora", "lora and base", "mixlora"}


def run_plans(
    base: BaseModel,
    monkeypatch: pytest.MonkeyPatch,
    plans: list[AdapterPlan | None],
    sampling: SamplingParams = SHORT,
    **changes: object,
) -> Run:
    with meta_engine(base, monkeypatch, **changes) as engine:
        run = engine.run([Wish(plan, sampling=sampling) for plan in plans])
    assert [repr(error)[:300] for error in run.errors] == []
    return run


def decode_step(run: Run) -> Work:
    """One in the middle: all rows decode, nothing is loaded, segments are known."""
    return run.steps[2]


@pytest.mark.parametrize(
    ("model_type", "cuda_graphs"),
    [*((name, False) for name in sorted(ARCHITECTURES)), ("llama", True), ("qwen3", True)],
)
def test_steps_of_an_architecture(
    model_type: str, cuda_graphs: bool, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(model_type)
    lora = lora_plan(tiny_model("llama"), rank=4, seed=1) if model_type == "llama" else None
    run = run_plans(base, monkeypatch, [lora, None], cuda_graphs=cuda_graphs)
    assert run.findings == []
    assert decode_step(run).n_replays == int(cuda_graphs and base.fused is not None)


# Operators of a layer that is not captured, which the host dispatches: as docs/gpu.md says.
OPERATORS = {
    "gemma": 27,
    "gemma2": 31,
    "gemma3_text": 41,
    "gpt2": 25,
    "phi": 37,
    "phi3": 33,
    "qwen3_moe": 49,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("model_type", OPERATORS)
def test_layers_without_graphs_dispatch_what_the_page_says(
    model_type: str, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    more = MOE if model_type == "qwen3_moe" else {}
    counts = []
    for n in (2, 4):
        base = base_of(model_type, **{name: n}, **more)
        step = decode_step(run_plans(base, monkeypatch, [None, None], cuda_graphs=True))
        assert step.n_replays == 0
        counts.append(len(step.launches) + len(step.kernels))
    assert (counts[1] - counts[0]) / 2 == OPERATORS[model_type]
    page = Path("docs/gpu.md").read_text("utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{model_type}` |"))
    assert row.split("|")[2].strip() == str(OPERATORS[model_type])


def test_recorded_steps_copy_nothing_and_wait_for_nothing(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraplex_server.engine.steps.step_graphs")
    with meta_engine(base_of(), monkeypatch, cuda_graphs=True) as engine:
        recorded = engine.gpu.take()
        assert recorded.n_captures >= 2
        logged = re.findall(r"captured (\d+) CUDA graphs of (\w+) layers", caplog.text)
        assert [kind for _, kind in logged] == ["base", "lora", "routed_mlp"]
        assert sum(int(n) for n, _ in logged) == recorded.n_captures
        assert recorded.findings == []
        run = engine.run([Wish(LORA, sampling=SHORT), Wish(sampling=SHORT)])
    assert run.errors == []
    assert run.findings == []
    n_pieces = len(base_of().layers) + 1  # the prompts' step; the last turn waits for ids alone
    assert [step.n_replays for step in run.steps] == [n_pieces, 1, 1, 1, 0]
    # Between the pieces of the prompts' step attention is launched, and nothing else of a layer.
    layers = [name for name in run.steps[0].launches if name not in AROUND_THE_LAYERS]
    assert layers == ["attend_kernel"] * (n_pieces - 1)
    for step in run.steps[1:-1]:
        assert set(step.launches) <= AROUND_THE_LAYERS


AROUND_THE_LAYERS = {"edit_kernel", "sort_kernel", "draw_kernel"}


def copied_ids_alone(copies: list[Copy], n_rows: int) -> bool:
    return sum(c.n_bytes for c in copies) <= 8 * n_rows and not any(
        c.dtype.is_floating_point for c in copies
    )


SAMPLINGS = {
    "greedy": SHORT,
    "sampled": SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, top_k=40, seed=1),
    "penalised": SamplingParams(
        max_tokens=4,
        temperature=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        logit_bias={3: 1.0},
    ),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_nothing_but_ids_comes_down(
    sampling: str, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_plans(base_of(), monkeypatch, [LORA, None], SAMPLINGS[sampling])
    for step in run.steps:
        assert copied_ids_alone(step.copies_out, 2), step.copies_out


def test_log_probabilities_come_down_if_they_are_asked_for(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dataclasses.replace(SHORT, logprobs=5)
    run = run_plans(base_of(), monkeypatch, [LORA, None], asked)
    for step in run.steps:  # of each row the id, its value, and five more of both
        assert sum(copy.n_bytes for copy in step.copies_out) <= 2 * (8 + 4 + 5 * (8 + 4))


def test_vectors_come_down_and_no_more(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    with meta_engine(base, monkeypatch) as engine:
        run = engine.run([Wish(LORA, pooling=Pooling(PoolingMode.LAST))])
    assert run.errors == []
    assert [c.shape for step in run.steps for c in step.copies_out] == [(1, base.spec.hidden_size)]


def test_vectors_and_tokens_of_one_step_part_without_waiting(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meta_engine(base_of(), monkeypatch) as engine:
        run = engine.run([Wish(sampling=SHORT), Wish(LORA, pooling=Pooling(PoolingMode.LAST))])
    assert (run.errors, run.findings) == ([], [])
    assert [copy for step in run.steps for copy in step.copies_in if copy.waits] == []


def test_keys_and_values_of_a_prefix_are_written_without_waiting(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODEL.config
    shape = (3, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    layers = tuple(torch.ones(shape) for _ in range(config.num_hidden_layers))
    plan = AdapterPlan("7" * 64, Family.PREFIX, {}, prefix=PrefixPlan(layers, layers))
    run = run_plans(base_of(), monkeypatch, [plan, None])
    assert run.findings == []
    assert [copy for step in run.steps for copy in step.copies_in if copy.waits] == []


def test_decode_steps_of_short_requests_launch_no_programs_of_long_ones(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided requests are merged by a launch of their own: where none can be, there is none."""
    monkeypatch.setattr(attention, "SPLIT_POSITIONS", 32)
    monkeypatch.setattr("loraplex_server.engine.steps.captured_sizes.SHORT_POSITIONS", 32)
    with meta_engine(base_of(), monkeypatch, cuda_graphs=True) as engine:
        found = [engine.run([Wish(prompt=tuple(range(7, 7 + n)), sampling=SHORT)]) for n in (5, 40)]
    merges = [[step.replayed.count("combine_kernel") for step in run.steps[1:4]] for run in found]
    assert merges == [[0] * 3, [len(base_of().layers)] * 3]


@pytest.mark.parametrize("cuda_graphs", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_step_copies_its_inputs_at_once_mixes_no_devices_and_waits_for_no_copy(
    cuda_graphs: bool, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy before each forward, and one of what sampling asks for behind them."""
    monkeypatch.setattr(expert_monitor, "_LOOK_EVERY_S", 0.0)  # the rare copy is in every step
    with meta_engine(base_of(), monkeypatch, cuda_graphs=cuda_graphs, max_loras=128) as engine:
        for mixture, plans in MIXTURES.items():
            n_forwards = 2 if cuda_graphs and mixture in SPLIT else 1
            run = engine.run([Wish(plan, sampling=SHORT) for plan in plans])
            assert (run.errors, run.findings) == ([], []), mixture
            for step in run.decode_steps:
                inputs = step.copies_in  # none of ``group_rows``: experts are grouped on the device
                where = [copy.where.partition(":")[0] for copy in inputs]
                assert where == ["kernels/formats/host_copy.py"] * (n_forwards + 1), mixture
                assert all(copy.is_pinned and not copy.waits for copy in inputs), inputs
                assert len(step.waits) <= 1  # for the ids
                assert not any(copy.waits for copy in step.copies_out), mixture
                assert step.n_replays == int(cuda_graphs), mixture


def test_adapters_are_loaded_and_published_without_waiting(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meta_engine(base_of(), monkeypatch) as engine:
        run = engine.run([Wish(LORA, sampling=SHORT), Wish(ROUTED["mixlora"], sampling=SHORT)])
        loaded = engine.loads.copies_in
    published = [c for step in run.steps for c in step.copies_in if "pool_tables.py" in c.where]
    assert len(published) >= 2
    assert {copy.where.partition(":")[0] for copy in loaded} >= {
        "kernels/lora/pool.py",
        "kernels/formats/host_copy.py",  # slots of experts
    }
    copies = [*published, *loaded]
    assert [copy for copy in copies if copy.waits or not copy.is_pinned] == []


@pytest.mark.parametrize(
    ("split", "each_pair"),
    [
        (64, False),
        pytest.param(64, True, marks=pytest.mark.nightly),
        pytest.param(512, True, marks=pytest.mark.nightly),
    ],
    ids=["long contexts", "long contexts, each pair", "short contexts, each pair"],
)
def test_no_kernel_is_compiled_while_requests_run(
    split: int, each_pair: bool, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of all lengths, alone and together, decode of one to nine rows, of four adapters.

    ``each_pair``: every length runs with every mixture of adapters, in place of one of them each
    and all of them together.
    """
    monkeypatch.setattr(attention, "SPLIT_POSITIONS", split)
    limits = {"max_batch_size": 9, "max_step_tokens": 300}
    with meta_engine(base_of(), monkeypatch, compiles=True, **limits) as engine:
        at_start = set(engine.gpu.variants)
        work = engine.gpu.take()
        assert work.findings == []
        assert ("combine_kernel" in work.launches) == (split == 64)
        mixed = [None, LORA, ROUTED["mixlora"], MIXTURES["mixdora"][0], OTHER_LORA]
        mixtures = [[None], [LORA], mixed[2:3], [LORA, None], mixed[:3] * 3]
        for turn, n_tokens in enumerate((1, 16, 17, 65, 129, 250)):
            prompt = tuple(range(7, 7 + n_tokens))
            own = mixtures if each_pair else [mixtures[turn % len(mixtures)]]
            for plans in [*own, mixed]:
                wishes = [Wish(plan, prompt, SHORT) for plan in plans]
                assert engine.run(wishes).errors == []
        new = engine.gpu.variants - at_start
    assert new == set()


@pytest.mark.parametrize(
    ("kernel", "plans", "lost"),
    [
        (
            (triton_lora, "lora_shrink"),
            [None],
            {what: ["lora", "routed_mlp"] for what in ("kernels", "graphs")},
        ),
        ((moe, "expand_gate"), [None, LORA], {"graphs": ["routed_mlp"]}),
    ],
    ids=["of LoRA", "of experts"],
)
def test_a_kernel_that_fails_costs_its_own_kind_of_layers_alone(
    kernel: tuple[ModuleType, str],
    plans: list[AdapterPlan | None],
    lost: dict[str, list[str]],
    base_of: BaseOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine starts without it, and the steps of other rows are replayed as before."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("ptxas: too many registers")

    limits = {"max_batch_size": 9, "max_step_tokens": 64, "cuda_graphs": True}
    wanted = run_plans(base_of(), monkeypatch, plans, **limits).steps
    monkeypatch.setattr(*kernel, fails)
    with meta_engine(base_of(), monkeypatch, compiles=True, **limits) as engine:
        found = engine.loop.runner.lost_at_start
        run = engine.run([Wish(plan, sampling=SHORT) for plan in plans])
        assert (run.errors, run.findings) == ([], [])
    assert [step.n_replays for step in run.steps] == [step.n_replays for step in wanted]
    assert [(each.what, each.layers) for each in found] == [
        (what, layers) for what, kinds in lost.items() for layers in kinds
    ]
    assert {each.problem for each in found} == {
        "lora_apply_triton: RuntimeError"
        if LORA not in plans
        else "gate_pairs_triton: RuntimeError"
    }
    assert f"layers: {found[0].problem}: ptxas: too many registers" in caplog.text


def test_recorded_experts_compile_nothing_while_requests_run(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"max_batch_size": 9, "max_step_tokens": 64, "cuda_graphs": True}
    with meta_engine(base_of(), monkeypatch, compiles=True, **limits) as engine:
        at_start = set(engine.gpu.variants)
        for mixture in MIXTURES.keys() - SPLIT:
            run = engine.run([Wish(plan, sampling=SHORT) for plan in MIXTURES[mixture]])
            assert (run.errors, run.findings) == ([], [])
        assert engine.gpu.variants - at_start == set()


# Of one layer of a decode step over few positions.
LAUNCHES = {
    ("llama", "base"): 9,
    ("llama", "lora and base"): 17,  # shrink and expand of four packed linears
    ("qwen3", "base"): 10,  # the norms of heads are one
    ("qwen3", "lora and base"): 18,
}


def launches_of_a_layer(
    model_type: str,
    mixture: str,
    base_of: BaseOf,
    monkeypatch: pytest.MonkeyPatch,
    **changes: object,
) -> float:
    """The difference that two more layers make, recorded or not."""
    counts = []
    for n_layers in (2, 4):
        base = base_of(model_type, num_hidden_layers=n_layers)
        model = tiny_model(model_type, num_hidden_layers=n_layers)
        lora = lora_plan(model, rank=4, seed=9)
        plans = [None if plan is None else lora for plan in MIXTURES[mixture]]
        if mixture == "mixlora":
            plans[0] = mixlora_plan(model, n_experts=4, top_k=2, rank=4, seed=9)
        step = decode_step(run_plans(base, monkeypatch, plans, **changes))
        counts.append(len(step.kernels) + len(step.replayed))
    return (counts[1] - counts[0]) / 2


@pytest.mark.parametrize(
    ("model_type", "mixture", "cuda_graphs"),
    [
        *((*row, False) for row in LAUNCHES),
        ("llama", "lora and base", True),
        ("qwen3", "lora and base", True),
        pytest.param("llama", "base", True, marks=pytest.mark.nightly),
        pytest.param("qwen3", "base", True, marks=pytest.mark.nightly),
    ],
)
def test_a_layer_launches_no_more_than_it_did(
    cuda_graphs: bool,
    model_type: str,
    mixture: str,
    base_of: BaseOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = launches_of_a_layer(model_type, mixture, base_of, monkeypatch, cuda_graphs=cuda_graphs)
    assert n <= LAUNCHES[model_type, mixture]


def test_a_captured_layer_with_experts_launches_no_more_than_it_did(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = launches_of_a_layer("llama", "mixlora", base_of, monkeypatch, cuda_graphs=True)
    assert n <= 22


def test_the_stand_in_finds_what_a_gpu_would_punish(monkeypatch: pytest.MonkeyPatch) -> None:
    with meta_gpu(monkeypatch) as gpu, torch.inference_mode():
        x = torch.zeros(4, 8, device=META)
        assert x.is_cuda
        x.sum().item()
        assert any("waits for the device" in what for what in gpu.take().findings)
        x.cpu()
        out = gpu.take()
        assert [(c.shape, c.waits) for c in out.copies_out] == [((4, 8), True)]
        x[torch.tensor([1, 2])]
        assert any("two devices" in what for what in gpu.take().findings)
        torch.ones(4, 8).pin_memory().to(META, non_blocking=True)
        assert [(c.is_pinned, c.waits) for c in gpu.take().copies_in] == [(True, False)]
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        x.copy_(torch.ones(4, 8))
        torch.cuda.synchronize()
        graph.capture_end()
        found = gpu.take().findings
        assert any("copy from the host while a graph is captured" in what for what in found)
        assert any("the device while a graph is captured" in what for what in found)
        with pytest.raises(NotImplementedError):
            x[x > 0]
    assert not x.is_cuda
