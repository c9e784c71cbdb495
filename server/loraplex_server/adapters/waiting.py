"""Awaits on the event loop what a thread will finish, without blocking a thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["result_within"]

T = TypeVar("T")


async def result_within(future: Future[T], timeout_s: float) -> T | None:
    """The result, or None after ``timeout_s``; the future goes on either way."""
    waiting = asyncio.wrap_future(future)
    done, _ = await asyncio.wait([waiting], timeout=timeout_s)
    return waiting.result() if done else None
