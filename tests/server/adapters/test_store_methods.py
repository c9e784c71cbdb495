"""SG-LoRA reads only adapters that the key may use."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import NotTrained, UnfitExamples
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.adapters.learning.store_methods import StoreMethods
from loraplex_server.settings.api_keys import EVERY_ADAPTER, AdapterAccess
from loraplex_server.tenant_shares import TenantThreads
from tests.support.bases.word_encoder import WordEncoder
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.servers.fake_engine import FakeEngine

REQUEST = AdapterGenerationRequest("to French", method="sg-lora", force=True)


@pytest.fixture
def store(base_spec: BaseSpec, tmp_path: Path) -> Iterator[AdapterStore]:
    """Three adapters with one description: two of tenants, one shared; and a generated one."""
    with AdapterStore(tmp_path / "store", base_spec) as store:
        for i, name in enumerate(("acme:ours", "other:theirs", "shared", "generated/abc")):
            order = AdapterGenerationRequest("any", seed=i)
            made = ScriptedGenerator(base_spec).generate(order)
            options = PutOptions(description="to French")
            store.put_tensors(name, made.config, made.tensors, options=options)  # type: ignore[arg-type]
        yield store


@pytest.mark.parametrize(
    ("access", "experts"),
    [
        (AdapterAccess(tenant="acme"), {"ours", "shared"}),
        (AdapterAccess(tenant="other", patterns=("theirs",)), {"theirs"}),
        (EVERY_ADAPTER, {"shared"}),
    ],
)
def test_a_mixture_holds_adapters_that_the_key_may_use(
    store: AdapterStore,
    tokenizer: PreTrainedTokenizerFast,
    access: AdapterAccess,
    experts: set[str],
) -> None:
    with _methods(store, tokenizer) as methods:
        order = asyncio.run(methods.order(REQUEST, access))
        assert order.make is not None
        made = order.make()
    assert set(made.card["parts"]) == experts  # type: ignore[call-overload]
    assert all(tensor.isfinite().all() for tensor in made.tensors.values())


def test_a_key_that_may_use_none_learns_what_is_missing(
    store: AdapterStore, tokenizer: PreTrainedTokenizerFast
) -> None:
    access = AdapterAccess(tenant="third", patterns=("mine/*",))
    with _methods(store, tokenizer) as methods:
        order = asyncio.run(methods.order(REQUEST, access))
        assert order.make is not None
        with pytest.raises(NotTrained, match="have a description"):
            order.make()
        pairs = AdapterGenerationRequest("x", method="sg-lora", examples=(("a", "b"), ("c", "d")))
        with pytest.raises(UnfitExamples, match="reads no examples"):
            asyncio.run(methods.order(pairs, access))


@contextlib.contextmanager
def _methods(store: AdapterStore, tokenizer: PreTrainedTokenizerFast) -> Iterator[StoreMethods]:
    threads = TenantThreads("generation", 1, 1)
    encode = WordEncoder().encode
    engine = FakeEngine(tokenizer)
    yield StoreMethods(store, engine, tokenizer, encode, threads, base_name="tiny", folder=None)
    threads.close(wait=True)
