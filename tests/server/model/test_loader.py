"""Loads run one at a time; what is loaded lazily is loaded once and never kept half."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex_server.model.loading.loader import Lazy, run_load
from tests.support.bases.architectures import tiny_model

_N_THREADS = 8


def _all_at_once(work: Callable[[int], object]) -> list[object]:
    """``work(i)`` on eight threads that start together."""
    barrier = threading.Barrier(_N_THREADS)

    def run(index: int) -> object:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(_N_THREADS) as executor:
        return list(executor.map(run, range(_N_THREADS)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


def test_eight_loads_at_once_in_two_dtypes_keep_theirs_and_the_default(directory: Path) -> None:
    dtypes = [torch.bfloat16, torch.float32] * (_N_THREADS // 2)

    def load(index: int) -> object:
        model = run_load(
            lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=dtypes[index])
        )
        return {parameter.dtype for parameter in model.parameters()}

    assert _all_at_once(load) == [{dtype} for dtype in dtypes]
    assert torch.get_default_dtype() is torch.float32


def test_a_load_that_fails_puts_the_default_dtype_back() -> None:
    def load() -> None:
        torch.set_default_dtype(torch.float64)
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        run_load(load)
    assert torch.get_default_dtype() is torch.float32


def test_eight_first_uses_load_once() -> None:
    n_loads = 0

    def load() -> object:
        nonlocal n_loads
        n_loads += 1
        return object()

    lazy = Lazy(load)
    found = _all_at_once(lambda _: lazy.get())
    assert n_loads == 1
    assert len(set(map(id, found))) == 1


def test_a_failed_load_is_not_kept() -> None:
    attempts: list[int] = []

    def load() -> str:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise OSError("the disk is gone")
        return "loaded"

    lazy = Lazy(load)
    with pytest.raises(OSError, match="disk is gone"):
        lazy.get()
    assert lazy.get() == "loaded"
    assert lazy.get() == "loaded"
    assert attempts == [0, 1]


def test_none_is_a_value_like_any_other() -> None:
    attempts: list[None] = []
    lazy: Lazy[None] = Lazy(lambda: attempts.append(None))
    lazy.get()
    lazy.get()
    assert len(attempts) == 1


def test_a_load_that_uses_another_lazy_value_does_not_block_whoever_loads_that_one() -> None:
    """As the generator's load uses the encoder, while the router asks for the encoder."""
    for _ in range(50):
        started, asked = threading.Event(), threading.Event()
        inner = Lazy(lambda: "encoder")

        def load(
            inner: Lazy[str] = inner,
            started: threading.Event = started,
            asked: threading.Event = asked,
        ) -> str:
            started.set()
            asked.wait()
            return f"generator with {inner.get()}"

        outer = Lazy(load)
        first = threading.Thread(target=outer.get, daemon=True)
        first.start()
        started.wait()
        second = threading.Thread(target=inner.get, daemon=True)
        second.start()
        asked.set()
        for thread in (first, second):
            thread.join(30)
            assert not thread.is_alive(), "each waits for the other's lock"
        assert outer.get() == "generator with encoder"
