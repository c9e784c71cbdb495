"""A tenant's full queue shows in /ready, and takes the server from nobody else."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.settings.api_keys import parse_keys
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio
_MOST = 512  # --max-queue


@pytest.fixture
def open_front(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Callable[..., Front]]:
    """With a key for each of the tables."""
    with ExitStack() as stack:

        def open_with(*tables: str) -> Front:
            keys = [
                f'[[key]]\nname = "key-{n}"\nsha256 = "{n:064x}"\n{table}\n'
                for n, table in enumerate(tables)
            ]
            http = HttpConfig(api_keys=parse_keys("".join(keys)) if keys else ())
            front = make_front(tokenizer, base_spec, tmp_path, http)
            stack.callback(front.close)
            return front

        yield open_with


async def _ready(front: Front) -> httpx.Response:
    return await front.client.get("/ready")


def _check_full(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "queue_full"
    assert answer.headers["retry-after"] == "1"


async def test_without_keys_there_is_one_queue(open_front: Callable[..., Front]) -> None:
    front = open_front()
    front.engine.queued[""] = _MOST - 1
    assert (await _ready(front)).json() == {"status": "ready"}
    front.engine.queued[""] = _MOST
    _check_full(await _ready(front))


async def test_the_full_queue_of_the_only_key_is_not_ready(
    open_front: Callable[..., Front],
) -> None:
    front = open_front('scope = "admin"\nmax_queued = 3', 'scope = "metrics"')
    front.engine.queued["key-0"] = 2
    assert (await _ready(front)).json() == {"status": "ready"}
    front.engine.queued["key-0"] = 3
    _check_full(await _ready(front))


async def test_one_full_queue_of_two_shows_and_both_are_not_ready(
    open_front: Callable[..., Front],
) -> None:
    front = open_front(
        'scope = "infer"\ntenant = "acme"\nmax_queued = 3',
        'scope = "admin"\ntenant = "acme"',
        'scope = "infer"\ntenant = "umbra"',
    )
    front.engine.queued["acme"] = 3
    answer = await _ready(front)
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "full_queues": 1}
    assert "acme" not in answer.text, "everybody may read it"
    front.engine.queued["umbra"] = _MOST
    _check_full(await _ready(front))
