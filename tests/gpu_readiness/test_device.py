"""``--device cuda:N``, the memory of a GPU, and what becomes of a request that it cannot hold."""

import pytest
import torch

from loraplex_adapter_store.families.low_rank.lora import row_norms
from loraplex_server.engine.memory.device import resolve_device
from loraplex_server.engine.steps.model_runner import ModelRunner
from tests.gpu_readiness.conftest import BaseOf
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.gpu.meta_device import META, meta_gpu
from tests.support.gpu.meta_engine import Wish, meta_engine
from tests.support.servers.engines import GREEDY

LORA = lora_plan(tiny_model("llama"), rank=4, seed=1)


@pytest.mark.parametrize(
    ("name", "resolved"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_a_device_is_named_with_its_number(
    name: str, resolved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meta_gpu(monkeypatch):
        assert resolve_device(name) == torch.device(resolved)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:2", r"torch sees 2 CUDA devices; use cuda:1 or a smaller number"),
        ("mps", "use cpu, cuda or cuda:N"),
        ("gpu", "use cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meta_gpu(monkeypatch), pytest.raises(ValueError, match=said):
        resolve_device(name)


def test_without_a_gpu_none_is_taken() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        resolve_device("cuda:0")


def test_every_thread_and_question_is_of_the_device_asked_for(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build, the engine and the loader make it current; memory is that of this device."""
    second = torch.device("meta", 1)
    with meta_engine(base_of(), monkeypatch, device=second, kv_memory_bytes=None) as engine:
        assert engine.run([Wish(LORA)]).errors == []
        assert set(engine.gpu.current) == {second}
        # the build's thread, mem_get_info, the loader's thread, the engine's, page-locked memory
        assert len(engine.gpu.current) >= 5


def test_memory_is_what_is_left_of_the_utilization(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 GiB, 60 free, a step of 1: 72 − 20 − 1 are shared. Lazily allocated: it is meta."""
    changes = {"kv_memory_bytes": None, "adapter_memory_bytes": None}
    with meta_engine(base_of(), monkeypatch, **changes) as engine:
        pool, kv = engine.loop.adapters.pool, engine.loop.kv_cache
        kv_bytes = sum(t.nbytes for t in (*kv.keys, *kv.values))
        assert engine.gpu.n_emptied >= 2
        # the step's own cache is no part of its activations: a few pages more or less
        assert kv_bytes + pool.bytes_total == pytest.approx(51 << 30, rel=1e-4)
        assert pool.bytes_total == pytest.approx(0.2 * (51 << 30), rel=1e-4)


def test_norms_of_dora_are_computed_where_the_weight_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a norm of each row comes down, and no weight: it has four times the rows at once."""
    n_out, n_in, rank = 4 * 2048 + 3, 16, 2
    a, b = torch.randn(rank, n_in), torch.randn(n_out, rank)
    weight = torch.randn(n_out, n_in, dtype=torch.bfloat16)
    with meta_gpu(monkeypatch) as gpu:
        norms = row_norms(torch.empty_like(weight, device=META), a, b)
        work = gpu.take()
    assert norms.shape == (n_out,)
    assert work.findings == []
    assert [(copy.shape, copy.dtype) for copy in work.copies_out] == [((n_out,), torch.float32)]
    dense = (weight.double() + b.double() @ a.double()).norm(dim=1)
    assert torch.allclose(row_norms(weight, a, b), dense.float())


@pytest.mark.parametrize("n_before", [0, 2], ids=["at once", "while another step runs"])
def test_a_step_without_memory_is_its_own_requests_error(
    n_before: int, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, tried, n_started = ModelRunner.start, [], []

    def short_of_memory(self: ModelRunner, chunks: list, *behind: object) -> object:  # type: ignore[type-arg]
        ids = [chunk.request.id for chunk in chunks]
        if "r0" in ids and len(n_started) >= n_before:
            tried.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory at 0x7f00")
        n_started.append(len(ids))
        return start(self, chunks, *behind)

    monkeypatch.setattr(ModelRunner, "start", short_of_memory)
    with meta_engine(base_of(), monkeypatch) as engine:
        before = engine.gpu.n_emptied
        done = engine.run([Wish(), Wish(LORA), Wish()])
        assert engine.gpu.n_emptied > before
    assert tried == [3, 1]
    assert [len(answer.token_ids) for answer in done.answers] == [
        n_before,
        *[GREEDY.max_tokens] * 2,
    ]
    error, *others = [answer.last.error for answer in done.answers]
    assert others == [None, None]
    assert "too little memory for this request" in str(error)
    assert "0x7f00" not in str(error)
