"""The arithmetic of least times, against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_kernels.roofline import (
    GPUS,
    MODELS,
    DecodeStep,
    base_linear,
    bounds,
    products_ms,
    roofline_lines,
)

_8B, _70B = MODELS
_H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


def test_attention_reads_every_key_and_value_once() -> None:
    """64 requests × 1,024 positions × 8 heads × 128 × (key, value) × 2 bytes a layer."""
    of = {bound.kernel: bound for bound in bounds(_8B, DecodeStep())}
    attend = of["attend_kernel"]
    assert attend.n_bytes == pytest.approx(268e6, rel=0.02)
    assert attend.n_launches == 32
    assert attend.least_us(_H100) == pytest.approx(81, rel=0.02)
    assert attend.flop == 4 * 64 * 1024 * 4096


def test_adapters_of_rank_16_read_their_factors() -> None:
    """Rank 16 on every linear of Llama-3.1-8B has 41.9 M parameters, as PEFT counts them.

    q, k and v, as gate and up, read their input by a factor A of their own.
    """
    of = {bound.kernel: bound for bound in bounds(_8B, DecodeStep(n_rows=0))}
    n_bytes = sum(
        of[name].n_bytes * of[name].n_launches for name in ("shrink_kernel", "expand_kernel")
    )
    assert n_bytes == pytest.approx(64 * 41_943_040 * 2, rel=1e-6)


@pytest.mark.parametrize(("format", "share"), [("int8", 1 / 2), ("fp8", 1 / 2), ("int4", 33 / 128)])
def test_quantised_linears_read_their_share_of_the_weights(format: str, share: float) -> None:
    """Llama-3.1-8B has 6.98 thousand million parameters in its layers' linears, 70B 68.5."""
    for model, n_weights in ((_8B, 6_979_321_856), (_70B, 68_451_041_280)):
        plain, quantised = (base_linear(model, DecodeStep(n_rows=0), f) for f in ("bf16", format))
        assert plain.n_bytes * plain.n_launches == 2 * n_weights
        assert quantised.n_bytes == pytest.approx(share * plain.n_bytes, rel=1e-6)
        assert quantised.least_us(_H100) == pytest.approx(share * plain.least_us(_H100), rel=1e-6)


def test_the_base_products_of_a_decode_step_read_every_weight_once() -> None:
    """Llama-3.1-8B has 218 M weights in the linears of a layer: 14 GB, 4.2 ms at 3.35 TB/s."""
    assert products_ms(_8B, 1, _H100, one_tile=False) == pytest.approx(4.17, rel=0.01)
    assert products_ms(_8B, 1, _H100, one_tile=True) == pytest.approx(4.17, rel=0.02)
    # 2,048 rows: 2 · 2048 · 218 M · 32 flop at 989 TFLOP/s; 32 flop for each byte of a tile
    free = products_ms(_8B, 2048, _H100, one_tile=False)
    assert free == pytest.approx(28.9, rel=0.01)
    tiled = products_ms(_8B, 2048, _H100, one_tile=True)
    assert tiled == pytest.approx(free * 989 / (32 * 5.5), rel=0.01)


def test_a_larger_model_never_takes_less() -> None:
    for small, large in zip(bounds(_8B, DecodeStep()), bounds(_70B, DecodeStep()), strict=True):
        assert small.kernel == large.kernel
        assert small.n_bytes <= large.n_bytes
        assert small.least_us(_H100) < small.least_us(GPUS[0]) or small.n_bytes == 0


def test_every_kernel_of_the_report_has_a_row() -> None:
    report = Path(__file__).parents[2] / "docs" / "kernels-report.json"
    compiled = {row["kernel"] for row in json.loads(report.read_text("utf-8"))["launches"]}
    assert compiled == {bound.kernel for bound in bounds(_8B, DecodeStep())}
    text = "\n".join(roofline_lines())
    for kernel in compiled:
        assert text.count(f"| {kernel} |") == len(MODELS)
