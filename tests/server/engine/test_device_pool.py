"""What the engine thread is told about loads."""

from __future__ import annotations

import copy
import threading

import torch

from loraplex_server.engine.capabilities import EngineCapabilities
from loraplex_server.engine.device_pool import DevicePool, Placement
from loraplex_server.model.base_model import BaseModel
from tests.support.architectures import tiny_model
from tests.support.routed_plans import lora_plan


def test_whoever_is_woken_by_a_load_finds_it_done() -> None:
    model = tiny_model("llama")
    base = BaseModel(copy.deepcopy(model), "tiny")
    plan = lora_plan(model, rank=8, seed=1)
    woken = threading.Event()
    was_done = []

    def on_loaded() -> None:
        was_done.append(pool.resident(plan.digest).load.done())
        woken.set()

    pool = DevicePool(
        base.groups,
        n_bytes=1 << 20,
        max_adapters=2,
        capabilities=EngineCapabilities.of_model(base),
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_loaded=on_loaded,
    )
    try:
        pool.place(plan)
        assert woken.wait(timeout=30)
        assert was_done == [True]
        assert pool.place(plan) is Placement.RESIDENT
    finally:
        pool.close()
