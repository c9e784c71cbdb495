"""Counts uploads while they arrive, so that limits of stored bytes hold for the staging folder."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraplex_server.errors import ApiError

Count = Callable[[int], None]


class ArrivingBytes:
    """The bytes of each tenant's unfinished uploads. Event loop only."""

    def __init__(self) -> None:
        self._n_bytes: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        return self._n_bytes[tenant]

    @contextmanager
    def upload(self, tenant: str, check: Count) -> Iterator[Count]:
        """Yield a function that counts the bytes of an upload until the end of the block.

        ``check`` gets the bytes of all unfinished uploads of the tenant, and raises ApiError.
        """
        n_of_upload = 0

        def count(n_bytes: int) -> None:
            nonlocal n_of_upload
            n_of_upload += n_bytes
            self._n_bytes[tenant] += n_bytes
            try:
                check(self._n_bytes[tenant])
            except ApiError as error:
                error.headers["connection"] = "close"  # the rest of the body stays unread
                raise

        try:
            yield count
        finally:
            self._n_bytes[tenant] -= n_of_upload
            if not self._n_bytes[tenant]:
                del self._n_bytes[tenant]
