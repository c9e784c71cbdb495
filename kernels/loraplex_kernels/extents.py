"""Free and taken extents of a flat range: best fit, neighbours merged when freed."""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["ExtentAllocator"]


class ExtentAllocator:
    """Hands out extents of ``[0, size)``. Not thread-safe: it has one owner."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.n_free = size
        self._by_size: list[tuple[int, int]] = []  # (length, start), sorted
        self._length_at: dict[int, int] = {}  # start → length of the free extent
        self._start_of_end: dict[int, int] = {}  # end → start of the free extent
        if size:
            self._add(0, size)

    @property
    def largest(self) -> int:
        """Length of the longest free extent."""
        return self._by_size[-1][0] if self._by_size else 0

    def take(self, length: int) -> int | None:
        """Start of an extent of ``length`` from the shortest free one that holds it, else None."""
        index = bisect_left(self._by_size, (length, -1))
        if index == len(self._by_size):
            return None
        found, start = self._by_size[index]
        self._drop(start, found)
        if found > length:
            self._add(start + length, found - length)
        self.n_free -= length
        return start

    def free(self, start: int, length: int) -> None:
        """Gives a taken extent, or a part of one, back."""
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
