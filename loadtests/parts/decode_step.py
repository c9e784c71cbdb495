"""Times the decode steps of a running engine."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import TokenEvent


async def step_ms(engine: Engine, requests: Sequence[GenerationRequest]) -> float:
    """Return the median time between the steps of a batch that decodes together."""
    loop = asyncio.get_running_loop()
    stamps: list[float] = []
    done = [loop.create_future() for _ in requests]

    def listen(index: int, event: TokenEvent) -> None:
        if index == 0 and event.token_ids:
            stamps.append(time.perf_counter())
        if event.finish is not None:
            done[index].set_result(event.error)

    for index, request in enumerate(requests):
        engine.submit(request, lambda event, index=index: listen(index, event))
    for error in await asyncio.gather(*done):
        if error is not None:
            raise error
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
    return statistics.median(gaps[len(requests) // 4 + 4 : -1])  # after every row has joined
