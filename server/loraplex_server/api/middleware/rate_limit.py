"""Rate limits of an API key: a bucket of requests and one of tokens, which refill evenly."""

import time
from collections.abc import Callable, Mapping

from loraplex_server.errors import invalid, too_many
from loraplex_server.settings.api_keys import ApiKey


class Bucket:
    """A bucket that holds the units of one minute and refills evenly."""

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
        """Take ``n`` units. A negative ``n`` gives units back."""
        self._level = min(float(self.size), self.level - n)

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.size)


class Meter:
    """The limits of one key. Lives on the event loop.

    A request counts on arrival. The most tokens that it may use are reserved before it runs, and
    settled at its end. So no burst overdraws the limit, and no answer is cut off.
    """

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        def bucket(per_minute: int | None) -> Bucket | None:
            return None if per_minute is None else Bucket(per_minute, clock)

        self._requests = bucket(key.requests_per_minute)
        self._tokens = bucket(key.tokens_per_minute)

    async def check_request(self) -> None:
        """Raises ApiError (429) if ``take_request`` would. Takes nothing."""
        _check(self._requests, "requests")

    async def take_request(self) -> None:
        """Take one request. Raises ApiError (429), and then takes nothing."""
        _check(self._requests, "requests")
        if self._requests is not None:
            self._requests.take(1)

    def check_tokens(self) -> None:
        """Raises ApiError (429) while no token is left."""
        _check(self._tokens, "tokens")

    @property
    def most_tokens(self) -> int | None:
        """The largest number of tokens of one call; None: no limit."""
        return None if self._tokens is None else self._tokens.size

    async def reserve_tokens(self, n: int) -> None:
        """Raises ApiError and takes nothing: 400 if ``n`` is above the limit, 429 if too early."""
        if self._tokens is None:
            return
        if n > self._tokens.size:
            raise invalid(
                f"this call may take up to {n} tokens (prompts and max_tokens of every choice), "
                f"its API key may use {self._tokens.size} a minute; request fewer",
                None,
                "tokens_above_limit",
            )
        _check(self._tokens, "tokens", n)
        self._tokens.take(n)

    def give_back_tokens(self, n: int) -> None:
        """Return reserved tokens that were not used."""
        if self._tokens is not None:
            self._tokens.take(-n)

    def headers(self) -> Mapping[str, str]:
        """Return OpenAI's ``x-ratelimit-*`` headers of the limits."""
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
