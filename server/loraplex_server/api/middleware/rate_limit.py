"""How much a key may still ask for: two buckets that refill evenly, a minute's worth deep."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from loraplex_server.api.errors import invalid, too_many
from loraplex_server.api_keys import ApiKey

__all__ = ["Bucket", "Meter", "RateLimiter"]


class Meter(Protocol):
    """What a call asks of the limits of its key. ``RateLimiter``, or one for several gateways."""

    async def check_request(self) -> None:
        """Raises ApiError (429) where ``take_request`` would now; takes nothing."""

    async def take_request(self) -> None:
        """Raises ApiError (429), and then takes nothing."""

    def check_tokens(self) -> None:
        """Raises ApiError (429) while no token is left."""

    @property
    def most_tokens(self) -> int | None:
        """Of one call; None: no limit."""

    async def reserve_tokens(self, n: int) -> None:
        """Raises ApiError, and then takes nothing: 400 if that can never be, 429 if not yet."""

    def give_back_tokens(self, n: int) -> None:
        """What was reserved and not used."""

    def headers(self) -> Mapping[str, str]:
        """OpenAI's ``x-ratelimit-*`` for what is limited."""


class Bucket:
    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.size = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        gained = (now - self._filled_at) * self.size / 60
        self._level = min(float(self.size), self._level + gained)
        self._filled_at = now
        return self._level

    def take(self, n: int) -> None:
        """A negative ``n`` gives back."""
        self._level = min(float(self.size), self.level - n)

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.size)


class RateLimiter:
    """Of one key. Lives on the event loop.

    A request is paid when it comes. The tokens that it may take at most are reserved before it runs
    and settled when it has ended, so no burst overdraws and no answer is cut off.
    """

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        def bucket(per_minute: int | None) -> Bucket | None:
            return None if per_minute is None else Bucket(per_minute, clock)

        self._requests = bucket(key.requests_per_minute)
        self._tokens = bucket(key.tokens_per_minute)

    async def check_request(self) -> None:
        """Raises ApiError (429) where ``take_request`` would now; takes nothing."""
        _check(self._requests, "requests")

    async def take_request(self) -> None:
        """Raises ApiError (429), and then takes nothing."""
        _check(self._requests, "requests")
        if self._requests is not None:
            self._requests.take(1)

    def check_tokens(self) -> None:
        """Raises ApiError (429) while no token is left."""
        _check(self._tokens, "tokens")

    @property
    def most_tokens(self) -> int | None:
        """Of one call; None: no limit."""
        return None if self._tokens is None else self._tokens.size

    async def reserve_tokens(self, n: int) -> None:
        """Raises ApiError, and then takes nothing: 400 if that can never be, 429 if not yet."""
        if self._tokens is None:
            return
        if n > self._tokens.size:
            raise invalid(
                f"this call may take up to {n} tokens (prompts and max_tokens of every choice), "
                f"its API key may use {self._tokens.size} a minute; ask for less",
                None,
                "tokens_above_limit",
            )
        _check(self._tokens, "tokens", n)
        self._tokens.take(n)

    def give_back_tokens(self, n: int) -> None:
        """What was reserved and not used."""
        if self._tokens is not None:
            self._tokens.take(-n)

    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*`` for what is limited."""
        headers: dict[str, str] = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.size)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
                headers[f"x-ratelimit-reset-{what}"] = f"{bucket.seconds_until(bucket.size):.3f}s"
        return headers


def _check(bucket: Bucket | None, what: str, n: int = 1) -> None:
    if bucket is not None and (wait_s := bucket.seconds_until(n)) > 0:
        needed = f", and this call may take {n}" if n > 1 else ""
        raise too_many(
            f"this API key may use {bucket.size} {what} a minute{needed}; "
            f"try again in {wait_s:.1f} s",
            "rate_limit_exceeded",
            wait_s,
        )
