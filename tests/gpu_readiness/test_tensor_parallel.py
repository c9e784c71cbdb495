"""A rank of a base cut in two, on the stand-in for a GPU: two sums a layer and nothing else new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.formats.layout import DeviceSegments
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_kernels.lora.segments import build_segments
from loraplex_kernels.triton.group_rows import allocate_segments
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.engine.parallel.shard_worker import ShardPool, _Worker
from loraplex_server.engine.parallel.step_tensors import bind_tensors, join, split, step_tensors
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.layers.tensor_parallel import Shard, ShardLayout
from loraplex_server.model.loading.shard_loader import Checkpoint
from tests.gpu_readiness.test_steps import LAUNCHES, LORA, MODEL, SHORT, decode_step
from tests.support.adapters.routed_plans import lora_plan, mixlora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.gpu.meta_device import META, meta_gpu
from tests.support.gpu.meta_engine import Run, Wish, hold_weights_as_on_a_gpu, meta_engine, on_meta

SIZE = 2
MIXLORA = mixlora_plan(MODEL, n_experts=4, top_k=2, rank=4, seed=3)


@dataclass
class _Group:
    """All of a group but its other processes: what they would be sent is laid together."""

    layout: ShardLayout
    calls: list[tuple[str, torch.Size, str]] = field(default_factory=list)

    def __deepcopy__(self, memo: object) -> _Group:
        return self

    def all_reduce(self, x: Tensor) -> None:
        self.calls.append(("all_reduce", x.shape, x.device.type))

    def broadcast(self, x: Tensor) -> None:
        self.calls.append(("broadcast", x.shape, x.device.type))

    def gather(self, x: Tensor) -> list[Tensor]:
        self.calls.append(("gather", x.shape, x.device.type))
        return [x] * SIZE

    def check(self) -> None: ...

    def attach_kv(self, n_pages: int, page_size: int) -> None: ...

    def write_prefix(self, slots: Tensor, whole: Tensor) -> None: ...

    @contextmanager
    def step(self, step: ForwardContext, embeddings: Tensor) -> Iterator[None]:
        joined, _ = join(step_tensors(step))
        self.broadcast(joined)
        self.broadcast(embeddings)
        yield

    @contextmanager
    def head(self, x: Tensor) -> Iterator[None]:
        yield

    def open(self, limits: object) -> None: ...

    def load(self, plan: AdapterPlan, first_slot: int) -> Callable[[], None]:
        return lambda: None

    def publish(self, digest: str) -> None: ...

    def forget(self, digest: str) -> None: ...

    def pack_with(self, packer: object) -> None: ...

    def when_lost(self, call: object) -> None: ...

    def close(self) -> None: ...


def rank_of(
    folder: Path,
    quantization: WeightFormat | None,
    model_type: str = "llama",
    rank: int = 0,
    **changes: Any,
) -> tuple[BaseModel, _Group]:
    """On the host, its weights as a GPU holds them."""
    tiny_model(model_type, **changes).save_pretrained(folder)
    checkpoint = Checkpoint(folder, SIZE, quantization)
    group = _Group(checkpoint.layout)
    own = checkpoint.load(rank, dtype=torch.bfloat16, device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        hold_weights_as_on_a_gpu(patch)
        shard = Shard(checkpoint.layout, rank, group, group if rank == 0 else None)
        return BaseModel(own, "tiny", self_check=False, shard=shard), group


def run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    plans: list[AdapterPlan | None],
    quantization: WeightFormat | None = None,
    **changes: Any,
) -> tuple[Run, _Group]:
    base, group = rank_of(folder, quantization, **changes)
    with meta_engine(base, monkeypatch, shard_workers=group, tensor_parallel_size=SIZE) as engine:
        group.calls.clear()
        ran = engine.run([Wish(plan, sampling=SHORT) for plan in plans])
    assert [repr(error)[:300] for error in ran.errors] == []
    return ran, group


@pytest.mark.parametrize("plans", [[None, None], [LORA, None], [MIXLORA, LORA, None]])
def test_a_step_adds_two_sums_a_layer(
    plans: list[AdapterPlan | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, group = run(tmp_path, monkeypatch, plans)
    assert ran.findings == []
    steps = [s for s in ran.steps if s.launches]  # the last turn reads counters alone
    n_rows = len(plans)
    of_a_step = len(group.calls) // len(steps)
    assert of_a_step * len(steps) == len(group.calls)
    last = group.calls[-of_a_step:]
    hidden, vocab = MODEL.config.hidden_size, MODEL.config.vocab_size
    assert last == [
        ("broadcast", last[0][1], "meta"),  # where the rows are and whose
        ("broadcast", (n_rows, hidden), "meta"),
        *[("all_reduce", (n_rows, hidden), "meta")] * (2 * MODEL.config.num_hidden_layers),
        ("broadcast", (n_rows, hidden), "meta"),
        ("gather", (n_rows, vocab // SIZE), "meta"),
    ]


@pytest.mark.parametrize("quantization", [None, WeightFormat.INT4])
@pytest.mark.parametrize(
    ("model_type", "mixture"),
    [
        pytest.param(*row, marks=[pytest.mark.nightly] if row[1] == "base" else [])
        for row in LAUNCHES
    ],
)
def test_a_layer_launches_what_it_does_alone(
    model_type: str,
    mixture: str,
    quantization: WeightFormat | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for n_layers in (2, 4):
        sizes = {"num_hidden_layers": n_layers, "intermediate_size": 128}
        lora = lora_plan(tiny_model(model_type, **sizes), rank=4, seed=9)
        plans = [lora if name == "lora" else None for name in mixture.split(" and ")]
        folder = tmp_path / str(n_layers)
        ran, _ = run(folder, monkeypatch, plans, quantization, model_type=model_type, **sizes)
        counts.append(Counter(decode_step(ran).kernels))
    of_two = counts[1] - counts[0]
    assert of_two.total() / 2 <= LAUNCHES[model_type, mixture]
    assert of_two["quantized_linear_kernel"] == (0 if quantization is None else 2 * 4)


def test_other_ranks_get_the_tables_of_the_device() -> None:
    """Segments built on the host would make every rank wait for the device at each linear."""
    segments = allocate_segments(300, 1, torch.device("cpu"), has_weights=False)
    sent, bound = ForwardContext(segments=segments), ForwardContext()
    bind_tensors(bound, split(*join(step_tensors(sent))))
    assert isinstance(bound.segments, DeviceSegments)
    assert (bound.segments.n_rows, bound.segments.block_m) == (300, segments.block_m)
    for name in ("slots", "indptr", "indices", "tiles", "pair_of", "pair_segments"):
        assert torch.equal(getattr(bound.segments, name), getattr(segments, name))


def test_another_rank_never_waits_for_its_device_in_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step of rank 1, with rows of an adapter and of the base."""
    base, group = rank_of(tmp_path, None, rank=1)
    n_rows = 5
    with meta_gpu(monkeypatch) as gpu, torch.inference_mode():
        model = on_meta(base)
        assert model.shard is not None
        worker = _Worker(model, model.shard)
        worker._attach_kv(n_pages=8, page_size=16)
        worker._pool = ShardPool(model, PoolLimits(1 << 20, n_slots=4))
        model.attach_pool(worker.pool.pool)
        rows = torch.empty(n_rows, dtype=torch.int64, device=META)
        counts = torch.empty(n_rows + 1, dtype=torch.int32, device=META)
        sent = ForwardContext(
            positions=rows,
            slot_mapping=rows,
            page_table=torch.empty(n_rows, 4, dtype=torch.int32, device=META),
            query_starts=counts,
            kv_lens=counts[1:],
            segments=build_segments(rows.int(), n_slots=1),
        )
        joined, layout = join(step_tensors(sent))
        fields = {"layout": layout, "n_bytes": joined.numel(), "n_rows": n_rows}
        gpu.take()
        worker._step({**fields, "routes_projections": False})
        work = gpu.take()
    assert (work.waits, work.copies_in, work.copies_out, work.findings) == ([], [], [], [])
    n_linears = 4 * MODEL.config.num_hidden_layers
    assert work.launches.count("expand_kernel") == work.launches.count("shrink_kernel") == n_linears
    sums = [call for call in group.calls if call[0] == "all_reduce"]
    assert len(sums) == 2 * MODEL.config.num_hidden_layers
