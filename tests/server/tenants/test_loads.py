"""Loads of one tenant that wait for room leave threads to the others."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.limits import StoreLimits
from tests.server.tenants.conftest import House, open_house
from tests.support.adapters.lora_files import write_lora

pytestmark = pytest.mark.anyio

N_WAITING = 20  # more than there are threads


async def _asked(house: House, key: str, adapter: str) -> int:
    body = {"prompt": "hi", "adapter": adapter, "max_tokens": 1}
    return (await house.ask(key, "POST", "/v1/completions", body)).status_code


async def test_loads_that_wait_for_room_do_not_hold_up_another_tenants(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    limits = StoreLimits(host_wait_s=600.0)
    with ExitStack() as closing:
        house = closing.enter_context(open_house(tokenizer, base_spec, tmp_path, limits=limits))
        store = house.front.store
        house.front.engine.max_queue = 2 * N_WAITING
        names = [f"acme:a{n}" for n in range(3 + N_WAITING)] + ["umbra:u0", "umbra:u1"]
        for seed, name in enumerate(names):
            source = write_lora(house.front.root / name.replace(":", "-"), base_spec, seed=seed)
            store.put_directory(name, source)
            store.unload(name)
        for name in names[:3]:
            closing.enter_context(store.acquire(name))
        store.acquire("umbra:u0").release()
        store.state.tier._n_bytes = store.stats().host_bytes_used  # full: in use, and umbra's share
        waiting = [
            asyncio.create_task(_asked(house, "acme", f"a{3 + number}"))
            for number in range(N_WAITING)
        ]
        other = asyncio.create_task(_asked(house, "umbra", "u1"))  # after them in every queue
        try:
            async with asyncio.timeout(60):
                assert await other == 200
            assert not any(call.done() for call in waiting)
        finally:
            for call in waiting:
                call.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        threads = house.front.app.state.parts.pools.loads._pool
        async with asyncio.timeout(60):  # who has left waits no longer
            await asyncio.to_thread(threads.shutdown)
