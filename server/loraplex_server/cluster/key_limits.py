"""What API keys use, counted in one place for all gateways: the deployment ``Limits``.

    gateway ── take, reserve, give back ──▶ Limits, one replica ── a ``RateLimiter`` for each key

A gateway asks before it lets a call run, so two of them cannot both take the last one. While the
replica is lost, each gateway counts for itself, and a key may use up to its limit on each; the new
replica starts with full buckets, as a restarted server does. ``max_running`` and ``max_queued`` are
counted by the engines, not here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loraplex_server.api.errors import ApiError
from loraplex_server.api.middleware.rate_limit import RateLimiter
from loraplex_server.api_keys import ApiKey

from .refused import Refused

__all__ = ["KeyLimits", "SharedMeter", "is_limited"]

_LIMIT_S = 2.0  # for an answer; the calls take a millisecond
_log = logging.getLogger(__name__)


def is_limited(key: ApiKey) -> bool:
    return bool(key.requests_per_minute or key.tokens_per_minute)


class Counted(NamedTuple):
    refused: Refused | None
    headers: Mapping[str, str]  # what is left, afterwards
    no_tokens: Refused | None  # what ``check_tokens`` would raise now


class KeyLimits:
    """Runs in one replica, on one event loop: every call is counted whole before the next."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._limiters = {key.id: RateLimiter(key) for key in keys if is_limited(key)}

    async def check_request(self, key_id: str) -> Counted:
        limiter = self._limiters[key_id]
        return await _asked(limiter, limiter.check_request())

    async def take_request(self, key_id: str) -> Counted:
        limiter = self._limiters[key_id]
        return await _asked(limiter, limiter.take_request())

    async def reserve_tokens(self, key_id: str, n: int) -> Counted:
        limiter = self._limiters[key_id]
        return await _asked(limiter, limiter.reserve_tokens(n))

    async def give_back_tokens(self, key_id: str, n: int) -> Counted:
        limiter = self._limiters[key_id]
        limiter.give_back_tokens(n)
        return _counted(limiter)


class SharedMeter:
    """Of one key in one gateway: see ``Meter``. Event loop only."""

    def __init__(self, key: ApiKey, limits: DeploymentHandle) -> None:
        self._key = key
        self._limits = limits
        self._alone = RateLimiter(key)  # counts while ``limits`` does not answer
        self._last: Counted | None = None  # None: ``_alone`` does count
        self._messages: set[asyncio.Task[bool]] = set()

    async def check_request(self) -> None:
        if not await self._ask("check_request"):
            await self._alone.check_request()

    async def take_request(self) -> None:
        if not await self._ask("take_request"):
            await self._alone.take_request()

    def check_tokens(self) -> None:
        if self._last is None:
            self._alone.check_tokens()
        elif self._last.no_tokens is not None:
            raise self._last.no_tokens.error()

    @property
    def most_tokens(self) -> int | None:
        return self._alone.most_tokens

    async def reserve_tokens(self, n: int) -> None:
        if not await self._ask("reserve_tokens", n):
            await self._alone.reserve_tokens(n)

    def give_back_tokens(self, n: int) -> None:
        if self._last is None:
            self._alone.give_back_tokens(n)
            return
        task = asyncio.get_running_loop().create_task(self._ask("give_back_tokens", n))
        self._messages.add(task)
        task.add_done_callback(self._messages.discard)

    def headers(self) -> Mapping[str, str]:
        return self._alone.headers() if self._last is None else self._last.headers

    async def _ask(self, method: str, *arguments: int) -> bool:
        """Whether it was counted there. Raises ApiError for what is refused."""
        handle = self._limits.options(method_name=method)
        try:
            answer = handle.remote(self._key.id, *arguments)
            counted: Counted = await asyncio.wait_for(answer, _LIMIT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            if self._last is not None:
                _log.warning("key %s is counted by this gateway alone: %s", self._key.id, error)
            self._last = None
            return False
        self._last = counted
        if counted.refused is not None:
            raise counted.refused.error()
        return True


async def _asked(limiter: RateLimiter, question: Awaitable[None]) -> Counted:
    try:
        await question
    except ApiError as error:
        return _counted(limiter, error)
    return _counted(limiter)


def _counted(limiter: RateLimiter, error: ApiError | None = None) -> Counted:
    try:
        limiter.check_tokens()
        no_tokens = None
    except ApiError as none_left:
        no_tokens = Refused.of(none_left)
    return Counted(None if error is None else Refused.of(error), limiter.headers(), no_tokens)
