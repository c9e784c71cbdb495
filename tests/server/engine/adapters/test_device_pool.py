"""Places on the device: who gets one, what it takes, and what a failed load leaves behind."""

import copy
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan, NormPlan
from loraplex_server.engine.adapters.device_pool import DevicePool, Residency
from loraplex_server.engine.errors import AdapterLoadFailed, NoAdapterSlot
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.base_model import BaseModel
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model

_V = "model.layers.0.self_attn.v_proj"


class _WokenPool(DevicePool):
    """Says when a load is done."""

    woken: threading.Event

    def load(self, plan: AdapterPlan) -> Residency:
        """Places it and waits for the load, however it ends."""
        self.woken.clear()
        if self.ensure_resident(plan) is Residency.LOADING:
            assert self.woken.wait(timeout=30)
        return self.ensure_resident(plan)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@contextmanager
def _pool(
    model: PreTrainedModel, *, n_bytes: int = 1 << 20, max_adapters: int = 2
) -> Iterator[_WokenPool]:
    base = BaseModel(copy.deepcopy(model), "tiny")
    woken = threading.Event()
    pool = _WokenPool(base, PoolLimits(n_bytes, max_adapters), on_loaded=woken.set)
    pool.woken = woken
    try:
        yield pool
    finally:
        pool.close()


def test_whoever_is_woken_by_a_load_finds_it_done(model: PreTrainedModel) -> None:
    plan = lora_plan(model, rank=8, seed=1)
    with _pool(model) as pool:
        pool.ensure_resident(plan)
        assert pool.woken.wait(timeout=30)
        assert pool.resident(plan.digest).load.done()
        assert pool.ensure_resident(plan) is Residency.RESIDENT


def _with_everything(model: PreTrainedModel, seed: int) -> AdapterPlan:
    return replace(
        lora_plan(model, rank=4, seed=seed),
        replaced_weights={_V: torch.ones(32, 64)},
        norms={"model.norm": NormPlan(weight=torch.ones(64))},
        embedding_rows={3: torch.ones(64), 1: torch.zeros(64)},
    )


def test_all_that_an_adapter_takes_is_counted_and_comes_back(model: PreTrainedModel) -> None:
    plan = _with_everything(model, 1)
    with _pool(model) as pool:
        assert pool.load(plan) is Residency.RESIDENT
        factors = sum(f.n_bytes for f in pool.packer.pack(plan).factors)
        own_v = 32 * 64 * 4 + 4 * (64 + 32) * 4  # its factors go with the weight
        beside = own_v + 64 * 4 + 2 * 64 * 4 + 64  # the token ids take an alignment
        assert pool.pool.bytes_used == factors + beside
        assert pool.resident(plan.digest).n_bytes == factors + beside
        assert pool.resident_bytes == {plan.digest: factors + beside}
        assert pool.drop(plan.digest) == factors + beside
        assert pool.pool.bytes_used == 0
        assert pool.resident_bytes == {}


def test_what_lies_beside_the_factors_is_in_the_pools_own_memory(model: PreTrainedModel) -> None:
    plan = _with_everything(model, 1)
    with _pool(model) as pool:
        pool.load(plan)
        parts = pool.resident(plan.digest).memory.parts.fallback
        storage = pool.pool.storage.untyped_storage().data_ptr()
        rows = parts.token_rows["model.embed_tokens"]
        found = [parts.replaced_weights[_V], parts.norms["model.norm"].weight, *_tensors(rows)]
        assert all(t is not None and t.untyped_storage().data_ptr() == storage for t in found)
        assert rows.token_ids.tolist() == [1, 3]
        assert torch.equal(rows.rows, torch.stack([torch.zeros(64), torch.ones(64)]))


def _tensors(rows: object) -> list[torch.Tensor]:
    return [rows.token_ids, rows.rows]  # type: ignore[attr-defined]


def _broken(plan: AdapterPlan) -> AdapterPlan:
    """Its load fails: nothing can be copied out of a tensor without memory."""
    return replace(plan, replaced_weights={_V: torch.empty(32, 64, device="meta")})


def test_a_load_that_failed_is_tried_again(model: PreTrainedModel) -> None:
    plan = lora_plan(model, rank=4, seed=2)
    with _pool(model) as pool:
        with pytest.raises(AdapterLoadFailed, match="could not be loaded"):
            pool.load(_broken(plan))
        assert pool.pool.bytes_used == 0
        assert pool.load(plan) is Residency.RESIDENT


def test_a_warm_load_that_failed_is_no_error_of_the_next_request(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    plan = lora_plan(model, rank=4, seed=2)
    with _pool(model) as pool, caplog.at_level(logging.WARNING):
        pool.warm(_broken(plan))
        assert pool.woken.wait(timeout=30)
        pool.publish_arrived()
        assert "cannot be warmed" in caplog.text
        assert pool.load(plan) is Residency.RESIDENT


def test_idle_adapters_make_room_and_held_ones_are_waited_for(model: PreTrainedModel) -> None:
    one, two, three = (lora_plan(model, rank=4, seed=seed) for seed in (1, 2, 3))
    with _pool(model) as pool:
        for plan in (one, two):
            pool.load(plan)
            pool.hold(plan.digest)
        assert pool.ensure_resident(three) is Residency.FULL
        pool.release(one.digest)
        assert pool.load(three) is Residency.RESIDENT
        assert set(pool.resident_bytes) == {two.digest, three.digest}
        assert pool.n_evictions == 1


def test_where_everything_is_pinned_the_request_hears_it(model: PreTrainedModel) -> None:
    one, two, three = (lora_plan(model, rank=4, seed=seed) for seed in (1, 2, 3))
    with _pool(model) as pool:
        for plan in (one, two):
            pool.set_pinned(plan.digest, True)
            pool.load(plan)
        pool.hold(one.digest)
        with pytest.raises(NoAdapterSlot, match=r"pinned.*--max-loras"):
            pool.ensure_resident(three)
        pool.set_pinned(two.digest, False)
        assert pool.load(three) is Residency.RESIDENT


def test_the_longest_unused_goes_first(model: PreTrainedModel) -> None:
    one, two, three = (lora_plan(model, rank=4, seed=seed) for seed in (1, 2, 3))
    with _pool(model) as pool:
        pool.load(one)
        pool.load(two)
        used_before = pool.resident(two.digest).last_used
        while time.monotonic() <= used_before:  # the clock's next tick
            pass
        pool.ensure_resident(one)
        pool.load(three)
        assert set(pool.resident_bytes) == {one.digest, three.digest}


def test_what_is_needed_sooner_is_not_evicted_for_what_is_needed_later(
    model: PreTrainedModel,
) -> None:
    one, two, three = (lora_plan(model, rank=4, seed=seed) for seed in (1, 2, 3))
    with _pool(model) as pool:
        pool.load(one)
        pool.load(two)
        sooner = {one.digest, two.digest}
        assert pool.ensure_resident(three, spared=sooner) is Residency.FULL
        assert set(pool.resident_bytes) == sooner
        assert pool.ensure_resident(three, spared={one.digest}) is not Residency.FULL
        assert two.digest not in pool.resident_bytes
