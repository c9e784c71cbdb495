"""An allocator of extents in a flat range: best fit, merging neighbours when they are freed."""

from bisect import bisect_left, insort


class ExtentAllocator:
    """Allocates extents of ``[0, size)``. Not thread-safe: it has one owner."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.n_free = size
        self._by_size: list[tuple[int, int]] = []  # (length, start), sorted
        self._length_at: dict[int, int] = {}  # start → length of the free extent
        self._start_of_end: dict[int, int] = {}  # end → start of the free extent
        if size:
            self._add(0, size)

    def take(self, length: int) -> int | None:
        """Allocate ``length`` in the shortest free extent that fits; return the start, or None."""
        index = bisect_left(self._by_size, (length, -1))
        if index == len(self._by_size):
            return None
        free_length, start = self._by_size[index]
        self._drop(start, free_length)
        if free_length > length:
            self._add(start + length, free_length - length)
        self.n_free -= length
        return start

    def free(self, start: int, length: int) -> None:
        """Free an allocated extent or a part of it."""
        self.n_free += length
        before = self._start_of_end.get(start)
        if before is not None:
            self._drop(before, start - before)
            start, length = before, start - before + length
        after = self._length_at.get(start + length)
        if after is not None:
            self._drop(start + length, after)
            length += after
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        insort(self._by_size, (length, start))
        self._length_at[start] = length
        self._start_of_end[start + length] = start

    def _drop(self, start: int, length: int) -> None:
        self._by_size.pop(bisect_left(self._by_size, (length, start)))
        del self._length_at[start]
        del self._start_of_end[start + length]
