"""One front for the tests of a module that change nothing in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.servers.fake_engine import FakeEngine

# Tests of these modules send requests and read answers. Each gets a fresh engine, but the same
# application and store. A test with adapters of its own (``lora``) has a front of its own.
_SHARED = frozenset(
    {
        *("test_bad_requests", "test_chat", "test_completions", "test_messages"),
        *("test_plain_errors", "test_prompt_logprobs", "test_responses", "test_streaming"),
        *("test_tools", "test_vectors"),
    }
)


@pytest.fixture(scope="module")
def module_front(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    front = make_front(tokenizer, base_spec, tmp_path_factory.mktemp("front"))
    yield front
    front.close()


@pytest.fixture
def front(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
) -> Iterator[Front]:
    module = request.node.module.__name__.rpartition(".")[2]
    if module in _SHARED and not {"lora", "own_front"} & set(request.fixturenames):
        shared: Front = request.getfixturevalue("module_front")
        assert isinstance(shared.engine, FakeEngine)
        shared.engine.reset()
        yield shared
        return
    front = make_front(tokenizer, base_spec, tmp_path)
    yield front
    front.close()
