"""A request whose events nobody streams."""

import asyncio

from .client import EngineClient, GenerationRequest
from .events import TokenEvent


async def run_to_end(engine: EngineClient, request: GenerationRequest) -> list[TokenEvent]:
    """Return all events of a request. Cancels it if the caller is cancelled. Raises EngineError."""
    done: asyncio.Future[list[TokenEvent]] = asyncio.get_running_loop().create_future()
    events: list[TokenEvent] = []

    def listen(event: TokenEvent) -> None:
        events.append(event)
        if event.finish is not None and not done.done():
            if event.error is not None:
                done.set_exception(event.error)
            else:
                done.set_result(events)

    engine.submit(request, listen)
    try:
        return await done
    except asyncio.CancelledError:  # the client left
        engine.cancel(request.request_id)
        raise
