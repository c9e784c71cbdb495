"""Finds stop strings in text that arrives in pieces, whatever the pieces.

Knuth-Morris-Pratt for each string: a character costs a constant time, however nearly it matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Scanned", "StopScanner"]


class Scanned(NamedTuple):
    text: str  # safe to show: no later piece can turn it into part of a stop string
    stop: str | None  # the stop string that ended the text


class _Matcher:
    """One stop string and how much of it the text ends with."""

    __slots__ = ("_borders", "n_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.n_matched = 0  # characters of ``stop`` that the text seen so far ends with
        self._borders = _borders(stop)

    def push(self, character: str) -> bool:
        """Whether ``character`` completes the string."""
        stop, n = self.stop, self.n_matched
        while n and stop[n] != character:
            n = self._borders[n - 1]
        n += stop[n] == character
        if n == len(stop):
            self.n_matched = self._borders[n - 1]
            return True
        self.n_matched = n
        return False


class StopScanner:
    """Holds back only a tail that may still become a stop string: at most max(len(stop)) − 1."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> Scanned:
        """Of several matches, the one that completes first wins; then the one that starts first.

        While not ``armed`` (fewer tokens than min_tokens) everything passes unchecked.
        """
        if not self._matchers or not armed:
            self._forget()
            text, self._held = self._held + text, ""
            return Scanned(text, None)
        seen = self._held + text
        n_before = len(self._held)
        for position, character in enumerate(text, n_before + 1):
            done = [m.stop for m in self._matchers if m.push(character)]
            if done:
                stop = max(done, key=len)  # all end here: the longest starts first
                self._held = ""
                self._forget()
                end = position if self._include else position - len(stop)
                return Scanned(seen[:end], stop)
        keep = max(matcher.n_matched for matcher in self._matchers)
        self._held = seen[len(seen) - keep :]
        return Scanned(seen[: len(seen) - keep], None)

    def flush(self) -> str:
        """The held tail: the text is over, so it is no stop string any more."""
        text, self._held = self._held, ""
        self._forget()
        return text

    def _forget(self) -> None:
        for matcher in self._matchers:
            matcher.n_matched = 0


def _borders(pattern: str) -> list[int]:
    """For each prefix the length of the longest proper prefix that also ends it."""
    borders = [0] * len(pattern)
    n = 0
    for i in range(1, len(pattern)):
        while n and pattern[n] != pattern[i]:
            n = borders[n - 1]
        n += pattern[n] == pattern[i]
        borders[i] = n
    return borders
