"""The paged KV cache: tensors, and the pages of each running request."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.formats.host_copy import move_together
from loraplex_kernels.formats.int8_cache import cache_width
from loraplex_kernels.formats.storage import allocate_storage
from loraplex_kernels.layers.model_ops import write_kv
from loraplex_server.model.layers.tensor_parallel import Shard

from .page_files import PageFiles
from .page_pool import KeyTurn, PagePool, page_keys
from .page_tier import PageTier
from .window import Window

PAGE_SIZE = 16  # tokens of a page in a server
_GONE = -1  # in place of a page that the window has passed


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The shape of each layer's cache."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    window: Window | None = None  # None: some layer sees all tokens

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of a page, keys and values of all layers."""
        width = cache_width(self.head_dim, dtype)
        return 2 * self.n_layers * self.n_kv_heads * width * page_size * dtype.itemsize


@dataclass(slots=True)
class _Table:
    row: int  # of ``page_table``
    pages: list[int]  # the first ``n_gone`` of them are ``_GONE``
    n_gone: int
    n_published: int  # leading pages that other requests can reuse
    last_key: bytes
    turn: KeyTurn | None  # where the keys become those of an activated adapter


class KvCache:
    """Owner of the KV pages and of the block tables. Engine thread only.

    ``keys[layer]`` and ``values[layer]`` are [n_pages, n_kv_heads, page_size, head_dim], in int8
    with two more columns (``loraplex_kernels.formats.int8_cache``).
    A request's table is [gone | shared, published | own, published | own, being filled]. Published
    pages are full and never written again. Pages are gone once no layer's window reaches them.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        *,
        n_pages: int,
        page_size: int,
        max_requests: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix_cache: bool,
        shard: Shard | None = None,  # of rank 0 in a tensor-parallel group
    ) -> None:
        self._shard, self._dtype = shard, dtype
        self.geometry = geometry
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        # One block, so that it gets huge pages: a step touches blocks of 2 KiB all over it.
        width = cache_width(geometry.head_dim, dtype)
        layer = (n_pages, geometry.n_kv_heads, page_size, width)
        storage = allocate_storage(2 * geometry.n_layers * math.prod(layer), dtype, device)
        self._storage = storage.zero_().view(2, geometry.n_layers, *layer)
        self.keys, self.values = (list(half.unbind(0)) for half in self._storage)
        self.page_table: NDArray[np.int32] = np.zeros(
            (max_requests, -(-max_model_len // page_size)), dtype=np.int32
        )
        self.n_queried = 0  # prompt tokens looked up
        self.n_found = 0  # prompt tokens taken from the cache
        self._pool = PagePool(n_pages)
        self._rows = list(range(max_requests - 1, -1, -1))
        self._tables: dict[str, _Table] = {}
        self._tier: PageTier | None = None

    @property
    def n_pages(self) -> int:
        return self._pool.n_pages

    @property
    def n_pages_held(self) -> int:
        return self._pool.n_held

    @property
    def n_pages_available(self) -> int:
        """Pages that a request could take now, cached ones included."""
        return self._pool.n_available

    @property
    def token_bytes(self) -> int:
        """The bytes of a token, keys and values of all layers."""
        return self.geometry.page_bytes(1, self._dtype)

    @property
    def n_restored(self) -> int:
        """The number of tokens that came back from files."""
        return 0 if self._tier is None else self._tier.n_restored * self.page_size

    def keep_in(
        self, files: PageFiles, *, n_written: int, on_arrival: Callable[[], object]
    ) -> None:
        """Keeps evicted pages in files from now on, at most ``n_written`` pages a step.

        ``on_arrival`` wakes the engine thread, and is called on any thread.
        """
        self._tier = PageTier(
            files,
            self._pool,
            self._storage.view(torch.uint8),
            n_written=n_written,
            n_spare=min(self.page_table.shape[1], self.n_pages // 2),
            on_arrival=on_arrival,
        )

    @property
    def has_files(self) -> bool:
        """True after ``keep_in``."""
        return self._tier is not None

    def move_pages(self) -> None:
        """Takes in pages from files, and copies pages for them. Called once a step."""
        if self._tier is not None:
            self._tier.step()

    def is_restoring(
        self, request_id: str, root: bytes, token_ids: Sequence[int], turn: KeyTurn | None
    ) -> bool:
        """Return True while pages of a waiting request's prefix come from files."""
        if self._tier is None:
            return False
        return self._tier.is_restoring(
            request_id, lambda: page_keys(root, token_ids[:-1], self.page_size, turn=turn)
        )

    def forget(self, request_id: str) -> None:
        """Ends ``is_restoring`` for a request that ended while it waited."""
        if self._tier is not None:
            self._tier.forget(request_id)

    def close(self, *, write: bool) -> None:
        """Ends the threads of ``keep_in``; with ``write`` cached pages go to files. Waits."""
        if self._tier is not None:
            self._tier.close(write=write)

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def pages_needed(self, n_tokens: int) -> int:
        """Return the most pages that a request of ``n_tokens`` holds at once."""
        return self._end_page(0, n_tokens)

    def admit(
        self,
        request_id: str,
        root: bytes,
        token_ids: Sequence[int],
        *,
        reuse: bool = True,
        turn: KeyTurn | None = None,
    ) -> int | None:
        """Open a table with pages for ``token_ids``; return how many tokens are cached.

        With a window the pages are those of the first steps, and ``extend`` adds others. The last
        token is never taken from the cache: its logits are needed. Returns None and changes nothing
        if there are not enough pages or rows.
        """
        if not self._rows:
            return None
        shared, last_key = (
            self._match(root, token_ids, turn) if reuse and self.prefix_cache else ([], root)
        )
        n_gone = self._first_page(len(shared))
        for page in shared[n_gone:]:
            self._pool.hold(page)
        fresh = self._pool.take(self._end_page(n_gone, len(token_ids)) - len(shared))
        if fresh is None:
            for page in shared[n_gone:]:
                self._pool.release(page)
            return None
        self.forget(request_id)
        row = self._rows.pop()
        table = _Table(row, shared + fresh, n_gone, len(shared), last_key, turn)
        self._tables[request_id] = table
        # No layer reads pages that are gone, so any number will do there.
        self.page_table[row, : len(table.pages)] = np.maximum(table.pages, 0)
        if reuse and self.prefix_cache:
            self.n_queried += len(token_ids)
            self.n_found += len(shared) * self.page_size
        return len(shared) * self.page_size

    def extend(self, request_id: str, n_tokens: int) -> bool:
        """Reserve pages for ``n_tokens`` in total. Return False, unchanged, if none are left.

        With a window the pages are those of the next steps.
        """
        table = self._tables[request_id]
        missing = self._end_page(table.n_gone, n_tokens) - len(table.pages)
        if missing <= 0:
            return True
        fresh = self._pool.take(missing)
        if fresh is None:
            return False
        first = len(table.pages)
        table.pages += fresh
        self.page_table[table.row, first : first + missing] = fresh
        return True

    def publish(self, request_id: str, token_ids: Sequence[int], n_computed: int) -> None:
        """Lets other requests reuse the pages that are full by now."""
        table = self._tables[request_id]
        n_full = n_computed // self.page_size
        if not self.prefix_cache or n_full <= table.n_published:
            return
        start = table.n_published * self.page_size
        keys = page_keys(
            table.last_key,
            token_ids[start : n_full * self.page_size],
            self.page_size,
            first_page=table.n_published,
            turn=table.turn,
        )
        for index, key in enumerate(keys, start=table.n_published):
            self._pool.publish(table.pages[index], key)
            table.last_key = key
        table.n_published = n_full

    def slide(self, request_id: str, n_computed: int) -> None:
        """Gives up the pages that no later query sees. The first ``n_computed`` tokens have KV.

        Published pages stay cached until they are evicted.
        """
        window, table = self.geometry.window, self._tables[request_id]
        if window is None:
            return
        n_gone = window.first_page(n_computed, self.page_size)
        for index in range(table.n_gone, n_gone):
            self._pool.release(table.pages[index])
            table.pages[index] = _GONE
        table.n_gone = max(table.n_gone, n_gone)

    def release(self, request_id: str) -> None:
        """Closes the table. Published pages stay cached until they are evicted."""
        table = self._tables.pop(request_id)
        # Last pages first, so that the beginning of a prefix is evicted last.
        for page in reversed(table.pages[table.n_gone :]):
            self._pool.release(page)
        self._rows.append(table.row)

    def row(self, request_id: str) -> int:
        """Return the request's row of ``page_table``."""
        return self._tables[request_id].row

    def write_prefix(
        self, request_id: str, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Imports KV [n_virtual, n_kv_heads, head_dim] per layer at the start of a request.

        The tensors have all heads, whichever ranks hold them.
        """
        n_tokens = keys[0].shape[0]
        device = self.keys[0].device
        pages = np.array(self._tables[request_id].pages, dtype=np.int64)
        position = np.arange(n_tokens)
        first = pages[position // self.page_size] * self.page_size
        (slots,) = move_together([first + position % self.page_size], device)
        dtype = torch.float32 if self._dtype is torch.int8 else self._dtype
        if self._shard is not None and self._shard.others is not None:
            whole = torch.stack([torch.stack(list(part)) for part in (keys, values)])
            whole = whole.to(self.keys[0])
            self._shard.others.write_prefix(slots, whole)
            heads = self._shard.layout.kv_heads(self._shard.rank)
            keys, values = (list(part[:, :, heads]) for part in whole)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            k, v = (part.to(device, dtype).contiguous() for part in (k, v))
            write_kv(k, v, self.keys[layer], self.values[layer], slots)

    def _first_page(self, n_pages: int) -> int:
        """Return the first page that is needed once ``n_pages`` pages are computed."""
        window = self.geometry.window
        return 0 if window is None else window.first_page(n_pages * self.page_size, self.page_size)

    def _end_page(self, n_gone: int, n_tokens: int) -> int:
        """Return the length of a table of ``n_tokens`` whose first ``n_gone`` pages are gone."""
        window, n_pages = self.geometry.window, self.pages_for(n_tokens)
        if window is None:
            return n_pages
        return min(n_pages, n_gone + window.n_pages(self.page_size))

    def _match(
        self, root: bytes, token_ids: Sequence[int], turn: KeyTurn | None
    ) -> tuple[list[int], bytes]:
        """Return the pages of the longest cached prefix, and the key of its last page.

        With a window only the pages that the next query sees have to be cached.
        """
        pages: list[int] = []
        best, last_key = 0, root
        n_together = 0  # cached pages at the end of ``pages``
        for key in page_keys(root, token_ids[:-1], self.page_size, turn=turn):
            page = self._pool.find(key)
            if page is None and self.geometry.window is None:
                break
            pages.append(_GONE if page is None else page)
            n_together = 0 if page is None else n_together + 1
            if n_together >= len(pages) - self._first_page(len(pages)):
                best, last_key = len(pages), key
        n_gone = self._first_page(best)
        return [_GONE] * n_gone + pages[n_gone:best], last_key
