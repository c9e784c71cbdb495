"""The adapters of a rank that is led: in rank 0's slots, in rank 0's order, or not at all."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.lora.pool import LoraPool
from loraplex_server.engine.adapters.adapter_packer import AdapterPacker
from loraplex_server.engine.adapters.capabilities import EngineCapabilities
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.engine.parallel.plan_cut import cut_plan
from loraplex_server.engine.parallel.shard_worker import ShardPool
from loraplex_server.model.layers.forward_context import ForwardContext
from tests.server.parallel.threads import ThreadGroup, load_ranks
from tests.support.adapters.routed_plans import lora_plan, mixlora_plan
from tests.support.bases.architectures import tiny_model

MODEL = tiny_model("llama")
A, B = lora_plan(MODEL, rank=4, seed=1), lora_plan(MODEL, rank=4, seed=2)
ROUTED = mixlora_plan(MODEL, n_experts=3, top_k=2, rank=4, seed=3)

Load = Callable[..., None]


@pytest.fixture
def pool_and_load(tmp_path: Path) -> tuple[ShardPool, Load]:
    """Rank 1's pool of four slots, and rank 0's way to have it load a plan."""
    MODEL.save_pretrained(tmp_path)
    rank_0, rank_1 = load_ranks(tmp_path, 2, ThreadGroup(2))
    assert rank_0.shard is not None
    layout = rank_0.shard.layout
    own = LoraPool(
        [group.target for group in rank_0.groups.values()],
        n_bytes=1 << 20,
        n_slots=4,
        dtype=torch.float32,
    )
    capabilities = EngineCapabilities.of_model(rank_0)
    packer = AdapterPacker(rank_0.groups, own, capabilities, layout)
    pool = ShardPool(rank_1, PoolLimits(1 << 20, n_slots=4, max_rank=16))

    def load(plan: AdapterPlan, *, first: int, after: int = 0) -> None:
        packed = packer.pack(plan).of_rank(1)
        pool.load(cut_plan(plan, layout, 1), packed, first=first, after=after)

    return pool, load


def test_a_load_waits_for_what_was_forgotten_before_it(
    pool_and_load: tuple[ShardPool, Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, load = pool_and_load
    load(A, first=0)
    pool.publish(A.digest)
    waits, wait_for = threading.Event(), pool._changed.wait_for

    def note(predicate: Callable[[], bool]) -> bool:
        waits.set()
        return wait_for(predicate)

    monkeypatch.setattr(pool._changed, "wait_for", note)
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(load, B, first=0, after=1)
        assert waits.wait(60)
        with pool._changed:  # which the load has let go of: it waits
            assert pool.pool.slots == (0,)
            assert not loading.done()
        pool.forget(A.digest)
        loading.result(60)
    pool.publish(B.digest)
    assert pool.pool.slots == (0,)


def test_a_load_that_fails_takes_nothing(pool_and_load: tuple[ShardPool, Load]) -> None:
    pool, load = pool_and_load
    load(A, first=2)
    used = pool.pool.bytes_used
    with pytest.raises(ValueError, match="in use"):
        load(ROUTED, first=0)  # four slots, of which one is taken
    assert pool.pool.bytes_used == used
    pool.forget(ROUTED.digest)  # as rank 0 does with every adapter that failed
    pool.forget(A.digest)
    assert pool.pool.bytes_used == 0
    load(ROUTED, first=0, after=2)


def test_rows_of_an_adapter_that_is_not_published_are_an_error(
    pool_and_load: tuple[ShardPool, Load],
) -> None:
    """Kernels would read rank 0, and the base would answer."""
    pool, load = pool_and_load
    step = ForwardContext(own_rows={ROUTED.digest: torch.tensor([0])})
    with pytest.raises(KeyError):
        pool.bind_rows(step)
    load(ROUTED, first=0)
    with pytest.raises(RuntimeError, match="before it is resident"):
        pool.bind_rows(step)
    pool.publish(ROUTED.digest)
    pool.bind_rows(step)
    assert step.routed.keys() == ROUTED.experts.keys()
