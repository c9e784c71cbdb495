"""Training has threads and a priority of its own, and leaves those of other threads alone."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from loraplex_generation.errors import GeneratorMismatch
from loraplex_generation.service import Generator
from loraplex_server.adapters.background_share import BackgroundShare
from loraplex_server.adapters.example_trainer import ExampleTrainer
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest

REQUEST = AdapterGenerationRequest("x", examples=(("a", "b"), ("c", "d")))


def told() -> tuple[int, int]:
    """Of the calling thread: how many threads torch takes, and the niceness."""
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    return torch.get_num_threads(), nice


@pytest.mark.skipif(sys.platform != "linux", reason="priorities are those of processes there")
def test_a_training_thread_yields_to_serving_and_others_stay_as_they_were() -> None:
    before = told()
    seen: list[tuple[int, int]] = []

    def find_generator() -> Generator:
        seen.append(told())
        raise GeneratorMismatch("for another base")

    def unused() -> object:
        raise AssertionError("not asked for")

    share = BackgroundShare(1.0, lambda: False)
    trainer = ExampleTrainer(find_generator, unused, unused, share, n_threads=3)  # type: ignore[arg-type]
    train = partial(trainer.train, deadline=0.0, stop=threading.Event(), report=lambda now: None)
    with ThreadPoolExecutor(1) as pool, pytest.raises(GeneratorMismatch):
        pool.submit(train, REQUEST).result()
    assert seen == [(3, max(10, before[1]))]
    assert told() == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(told).result() == (1, before[1])
