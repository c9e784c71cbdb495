"""Which attention runs where, and what ``--deterministic`` launches, on the stand-in for a GPU."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

from tests.gpu_readiness.conftest import BaseOf
from tests.gpu_readiness.test_steps import MIXTURES
from tests.support.gpu.flashinfer_stand_in import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    install_flashinfer,
)
from tests.support.gpu.meta_device import MetaEvent, Work
from tests.support.gpu.meta_engine import Wish, meta_engine
from tests.support.servers.engines import GREEDY

SHORT = dataclasses.replace(GREEDY, max_tokens=4)
BIG_HEADS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
CUBLAS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}


def attended(step: Work) -> str:
    return "triton" if "attend_kernel" in step.launches else "flashinfer"


def of_graphs(
    wrappers: list[BatchPrefillWithPagedKVCacheWrapper],
) -> list[BatchPrefillWithPagedKVCacheWrapper]:
    return [w for w in wrappers if isinstance(w, BatchDecodeWithPagedKVCacheWrapper)]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_flashinfer_attends_in_every_step(
    cuda_graphs: bool,
    base_of: BaseOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrappers = install_flashinfer(monkeypatch)
    base = base_of("llama", **BIG_HEADS)
    with (
        caplog.at_level(logging.INFO),
        meta_engine(base, monkeypatch, cuda_graphs=cuda_graphs) as e,
    ):
        e.gpu.take()
        assert {attended(graph) for graph in e.gpu.recorded} <= {"flashinfer"}
        planned = sum(w.n_plans for w in of_graphs(wrappers))
        run = e.run([Wish(sampling=SHORT), Wish(sampling=SHORT)])
    assert run.errors == []
    assert run.findings == []
    n_layers = len(base.layers)
    launched = run.steps[:-1]  # the last turn waits for ids
    n_eager = 1 if cuda_graphs else len(launched)
    assert {attended(step) for step in launched} == {"flashinfer"}
    # FlashInfer attends between the pieces of the prompts' step.
    n_recorded = [n_layers + 1, 1, 1, 1] if cuda_graphs else [0] * 4
    assert [step.n_replays for step in launched] == n_recorded
    of_steps = [w for w in wrappers if w not in of_graphs(wrappers)]
    assert sum(w.n_plans for w in of_steps) == 1 + n_eager  # one at start
    assert sum(w.n_runs for w in of_steps) == 1 + n_eager * n_layers
    # Each replay of a decode step is planned, once for all layers.
    n_planned = sum(w.n_plans for w in of_graphs(wrappers)) - planned
    assert n_planned == len(launched) - n_eager
    for step in run.steps:
        assert not any(copy.waits for copy in (*step.copies_in,))
        assert len(step.waits) <= 1
    assert [r.message for r in caplog.records if "attention:" in r.message] == [
        "attention: FlashInfer"
    ]


@pytest.mark.parametrize(("max_step_tokens", "cuda_graphs"), [(16, False), (64, False), (64, True)])
def test_no_plan_overwrites_one_that_a_busy_device_has_not_read(
    max_step_tokens: int, cuda_graphs: bool, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has got nowhere until somebody waits for it: of chunks of a prompt nobody waits
    for ids."""
    wrappers = install_flashinfer(monkeypatch)
    plan = BatchPrefillWithPagedKVCacheWrapper.plan
    last: dict[BatchPrefillWithPagedKVCacheWrapper, int] = {}  # of its plans, by number
    before = defaultdict[MetaEvent, int](int)  # the last plan before it on the stream
    n_plans = n_read = n_waits = 0

    def planned(self: BatchPrefillWithPagedKVCacheWrapper, *args: Any, **kwargs: Any) -> None:
        nonlocal n_plans
        assert last.get(self, 0) <= n_read, "its memory may still be copied from"
        plan(self, *args, **kwargs)
        n_plans = last[self] = n_plans + 1

    def record(self: MetaEvent, stream: object = None) -> None:
        before[self] = n_plans

    def synchronize(self: MetaEvent) -> None:
        nonlocal n_read, n_waits
        n_read, n_waits = max(n_read, before[self]), n_waits + 1

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "plan", planned)
    monkeypatch.setattr(MetaEvent, "record", record)
    monkeypatch.setattr(MetaEvent, "query", lambda self: before[self] <= n_read)
    monkeypatch.setattr(MetaEvent, "synchronize", synchronize)
    limits = {"max_step_tokens": max_step_tokens, "cuda_graphs": cuda_graphs}
    with meta_engine(base_of("llama", **BIG_HEADS), monkeypatch, **limits) as engine:
        n_read = at_start = n_plans  # where the device is waited for
        assert (at_start > 2) if cuda_graphs else (at_start == 2)
        n_waits = 0
        run = engine.run([Wish(prompt=tuple(range(60)), sampling=SHORT)])
    assert run.errors == []
    n_chunks = -(-60 // max_step_tokens)
    assert sum(w.n_plans for w in wrappers) == n_plans == at_start + n_chunks + SHORT.max_tokens - 1
    if not cuda_graphs:
        # the ids of each token; and, behind chunks without ids, the plan before the last
        assert n_waits == SHORT.max_tokens + n_chunks - 1


@pytest.mark.parametrize(
    ("asked", "heads", "deterministic", "level"),
    [
        ("auto", BIG_HEADS, True, logging.INFO),  # it sums as the batch is
        ("auto", {}, False, logging.INFO),  # heads of 16
        ("flashinfer", {}, False, logging.WARNING),
        ("triton", BIG_HEADS, False, None),
    ],
)
def test_where_it_does_not_fit_triton_attends_and_the_log_says_so(
    asked: str,
    heads: dict[str, int],
    deterministic: bool,
    level: int | None,
    base_of: BaseOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrappers = install_flashinfer(monkeypatch)
    changes = {"attention_backend": asked, "deterministic": deterministic}
    with (
        caplog.at_level(logging.INFO),
        meta_engine(base_of("llama", **heads), monkeypatch, **changes) as engine,
    ):
        run = engine.run([Wish(sampling=SHORT)])
    assert run.errors == []
    assert {attended(step) for step in run.steps[:-1]} == {"triton"}  # the last turn waits for ids
    assert wrappers == []
    told = [record.levelno for record in caplog.records if "attention:" in record.message]
    assert told == ([] if level is None else [level])


@pytest.mark.parametrize(
    ("cuda_graphs", "mixtures"),
    [
        (True, ("lora and base", "all routed", "all", "a norm of its own")),
        pytest.param(True, MIXTURES, marks=pytest.mark.nightly),
        pytest.param(False, MIXTURES, marks=pytest.mark.nightly),
    ],
    ids=["graphs", "graphs, each family alone", "no graphs, each family alone"],
)
def test_deterministic_steps_leave_no_product_to_cublas(
    cuda_graphs: bool, mixtures: Iterable[str], base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The few mixtures hold an adapter of every kind of launch; the night runs each alone."""
    changes = {"deterministic": True, "cuda_graphs": cuda_graphs, "max_loras": 128}
    with meta_engine(base_of(), monkeypatch, **changes) as engine:
        at_start = engine.gpu.take()
        assert at_start.findings == []
        assert bool(engine.gpu.recorded) == cuda_graphs
        for step in (at_start, *engine.gpu.recorded):
            assert CUBLAS.isdisjoint(step.kernels)
        for mixture in mixtures:
            run = engine.run([Wish(plan, sampling=SHORT) for plan in MIXTURES[mixture]])
            assert (run.errors, run.findings) == ([], []), mixture
            for step in run.steps:
                assert CUBLAS.isdisjoint(step.kernels), mixture
            for step in run.steps[:-1]:  # the last turn waits for ids
                assert "matmul_kernel" in step.launches  # of the head, where layers are replayed


def test_without_the_flag_products_are_cublas(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meta_engine(base_of(), monkeypatch) as engine:
        run = engine.run([Wish(sampling=SHORT)])
    assert not CUBLAS.isdisjoint(run.steps[-2].kernels)


def test_sums_over_several_gpus_are_not_promised(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"deterministic": True, "tensor_parallel_size": 2}
    with (
        pytest.raises(ValueError, match="--tensor-parallel-size"),
        meta_engine(base_of(), monkeypatch, **changes),
    ):
        pass
