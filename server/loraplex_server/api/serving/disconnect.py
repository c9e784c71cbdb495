"""Stops the work for a client that has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.types import Receive

__all__ = ["ClientLeft", "client_left", "unless_client_leaves"]

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to answer."""


async def client_left(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(work: Coroutine[object, object, T], receive: Receive) -> T:
    """Cancels ``work`` and raises ClientLeft when the client goes first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(client_left(receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
