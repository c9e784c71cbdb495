"""What a step of a quantised base asks of a GPU: one launch of ours where cuBLAS had one."""

import dataclasses
from collections import Counter

import pytest

from loraplex_kernels.formats.quantized_weight import WeightFormat
from tests.gpu_readiness.conftest import BaseOf
from tests.gpu_readiness.test_steps import MIXTURES, decode_step, run_plans
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.gpu.meta_device import Work
from tests.support.gpu.meta_engine import Wish, meta_engine
from tests.support.servers.engines import GREEDY

SHORT = dataclasses.replace(GREEDY, max_tokens=3)
N_LINEARS = 4  # packed ones of a layer


def step_of(
    n_layers: int,
    mixture: str,
    format: WeightFormat | None,
    base_of: BaseOf,
    monkeypatch: pytest.MonkeyPatch,
) -> Work:
    model = tiny_model("llama", num_hidden_layers=n_layers)
    plans = [
        None if plan is None else lora_plan(model, rank=4, seed=9) for plan in MIXTURES[mixture]
    ]
    base = base_of(quantization=format, num_hidden_layers=n_layers)
    return decode_step(run_plans(base, monkeypatch, plans))


@pytest.mark.parametrize("format", list(WeightFormat))
@pytest.mark.parametrize(
    "mixture", [pytest.param("base", marks=pytest.mark.nightly), "lora and base"]
)
def test_a_layer_has_the_launches_of_a_16_bit_base(
    mixture: str, format: WeightFormat, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference that two more layers make, kernel by kernel."""
    counts = {}
    for kind in (None, format):
        small, large = (step_of(n, mixture, kind, base_of, monkeypatch) for n in (2, 4))
        counts[kind] = Counter(large.kernels) - Counter(small.kernels)
    plain, quantised = counts[None], counts[format]
    assert quantised.pop("quantized_linear_kernel") == 2 * N_LINEARS
    assert sum((plain - quantised).values()) == 2 * N_LINEARS  # cuBLAS's
    assert quantised - plain == Counter()


@pytest.mark.parametrize(
    ("mixture", "format"),
    [
        ("all routed", WeightFormat.INT4),
        ("lora and base", WeightFormat.INT8),
        ("lora and base", WeightFormat.FP8),
        pytest.param("lora and base", WeightFormat.INT4, marks=pytest.mark.nightly),
        pytest.param("all routed", WeightFormat.INT8, marks=pytest.mark.nightly),
        pytest.param("all routed", WeightFormat.FP8, marks=pytest.mark.nightly),
    ],
)
def test_no_step_mixes_devices_or_waits(
    mixture: str, format: WeightFormat, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_plans(base_of(quantization=format), monkeypatch, MIXTURES[mixture])
    assert run.findings == []
    assert all(len(step.waits) <= 1 for step in run.decode_steps)  # for the ids


def test_decode_steps_are_recorded_and_nothing_is_compiled_in_service(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, slices = MIXTURES["lora"][0], MIXTURES["scales of slices"][0]
    limits = {"max_batch_size": 5, "max_step_tokens": 80}
    base = base_of(quantization=WeightFormat.INT4)
    with meta_engine(base, monkeypatch, compiles=True, cuda_graphs=True, **limits) as engine:
        at_start = set(engine.gpu.variants)
        assert engine.gpu.take().findings == []
        for n_tokens in (1, 17, 65):
            prompt = tuple(range(7, 7 + n_tokens))
            wishes = [Wish(plan, prompt, SHORT) for plan in (lora, slices, None)]
            run = engine.run(wishes)
            assert (run.errors, run.findings) == ([], [])
            assert run.decode_steps[-1].n_replays == 1
        assert engine.gpu.variants - at_start == set()
