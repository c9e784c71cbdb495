"""``--kv-cache-dtype`` on the stand-in for a GPU: fp8 halves the bytes a token, int8 is refused."""

import dataclasses

import pytest
import torch

from loraplex_server.engine.build import assemble_engine
from loraplex_server.engine.config import EngineConfig
from tests.gpu_readiness.conftest import BaseOf
from tests.support.gpu.flashinfer_stand_in import install_flashinfer
from tests.support.gpu.meta_engine import Wish, meta_engine
from tests.support.servers.engines import GREEDY

SHORT = dataclasses.replace(GREEDY, max_tokens=4)
BIG_HEADS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_an_fp8_cache_holds_twice_the_tokens_and_launches_the_same(
    backend: str, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flashinfer(monkeypatch)
    base = base_of("llama", **BIG_HEADS)
    launches, pages = [], []
    for dtype in ("auto", "fp8"):
        changes = {"attention_backend": backend, "kv_cache_dtype": dtype}
        with meta_engine(base, monkeypatch, **changes) as engine:
            run = engine.run([Wish(sampling=SHORT), Wish(sampling=SHORT)])
            cache = engine.loop.kv_cache
            assert cache.keys[0].dtype is (base.dtype if dtype == "auto" else torch.float8_e4m3fn)
            pages.append(cache.n_pages)
        assert (run.errors, run.findings) == ([], [])
        launches.append([(step.launches, step.n_replays) for step in run.steps])
    assert launches[0] == launches[1]
    assert pages[1] // 2 == pages[0]


def test_an_fp8_cache_on_a_cpu_is_refused(base_of: BaseOf) -> None:
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8 needs one GPU"):
        assemble_engine(base_of("llama"), EngineConfig(kv_cache_dtype="fp8"))


def test_an_int8_cache_on_a_gpu_is_refused(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = pytest.raises(ValueError, match="--kv-cache-dtype int8 needs a CPU")
    base = base_of("llama", **BIG_HEADS)
    with refused, meta_engine(base, monkeypatch, kv_cache_dtype="int8"):
        pass
