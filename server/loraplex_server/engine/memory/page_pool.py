"""Bookkeeping of KV pages: their holders, and the prefixes by which pages are found again.

A page is in exactly one of three states:
    free      no content                          in ``_free``
    cached    content kept, no holder             in ``_cached`` (least recently used first)
    held      one or more requests read it        ``_holders[page] > 0``
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple


class KeyTurn(NamedTuple):
    """The first page that an activated adapter writes to. Its key and later ones are its own."""

    page: int  # index in the request
    name: bytes  # of the adapter and of the position where it begins


def prefix_root(adapter_digest: str, salt: str) -> bytes:
    """Return the root key of all prefixes of one adapter digest and tenant salt.

    So KV never crosses adapters, revisions or tenants.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for part in (adapter_digest, salt):
        data = part.encode()
        hasher.update(len(data).to_bytes(4, "little"))
        hasher.update(data)
    return hasher.digest()


def page_keys(
    root: bytes,
    token_ids: Sequence[int],
    page_size: int,
    *,
    first_page: int = 0,
    turn: KeyTurn | None = None,
) -> Iterator[bytes]:
    """Yield the chained key of each full page of ``token_ids``.

    ``root`` is the key before ``first_page``, where ``token_ids`` begin.
    """
    key = root
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        if turn is not None and first_page + start // page_size == turn.page:
            key = hashlib.blake2b(turn.name, key=key, digest_size=16).digest()
        block = array("q", token_ids[start : start + page_size]).tobytes()
        key = hashlib.blake2b(block, key=key, digest_size=16).digest()
        yield key


class PagePool:
    """Owner of page states. Engine thread only."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * n_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def n_available(self) -> int:
        """The number of pages that can be taken, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def n_held(self) -> int:
        return self.n_pages - self.n_available

    @property
    def n_free(self) -> int:
        """The number of pages without content."""
        return len(self._free)

    def oldest_cached(self, n_pages: int) -> list[tuple[int, bytes]]:
        """Return up to ``n_pages`` cached pages and their keys, those to be evicted first."""
        return [(page, self._key_of[page]) for page in islice(self._cached, n_pages)]

    def take(self, n_pages: int) -> list[int] | None:
        """Take ``n_pages`` pages with one holder each; return None if there are not enough."""
        if n_pages > self.n_available:
            return None
        return [self._take_one() for _ in range(n_pages)]

    def find(self, key: bytes) -> int | None:
        """Return the page of this prefix, if any. Adds no holder."""
        return self._page_of.get(key)

    def hold(self, page: int) -> None:
        """Adds a holder to a page that ``find`` returned."""
        if self._holders[page] == 0:
            del self._cached[page]
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Removes a holder. Without holders the page is cached if it has a key, else free."""
        if self._holders[page] <= 0:
            raise RuntimeError(f"page {page} released more often than held")
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Registers a full page under its key. The first page with a key keeps the key."""
        if page in self._key_of or key in self._page_of:
            return
        self._key_of[page] = key
        self._page_of[key] = page

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unpublish(page)
        self._holders[page] = 1
        return page

    def _unpublish(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
