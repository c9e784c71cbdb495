"""Finds stop strings in text that arrives in pieces.

Knuth-Morris-Pratt for each string: each character costs constant time, also in near matches.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Scanned(NamedTuple):
    """The result of one piece of text."""

    text: str  # safe to show: it cannot become part of a stop string
    stop: str | None  # the stop string that ended the text


class _Matcher:
    """Matches one stop string with the end of the text."""

    __slots__ = ("_borders", "n_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.n_matched = 0  # characters of ``stop`` that the text seen so far ends with
        self._borders = _borders(stop)

    def push(self, character: str) -> bool:
        """Return True if ``character`` completes the string."""
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
    """Holds back a tail that may become a stop string: at most max(len(stop)) − 1 characters."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> Scanned:
        """The match that ends first wins, and among those the match that starts first.

        If not ``armed``, with fewer tokens than min_tokens, the text passes unchecked.
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
                stop = max(done, key=len)  # all end here, so the longest starts first
                self._held = ""
                self._forget()
                end = position if self._include else position - len(stop)
                return Scanned(seen[:end], stop)
        keep = max(matcher.n_matched for matcher in self._matchers)
        self._held = seen[len(seen) - keep :]
        return Scanned(seen[: len(seen) - keep], None)

    def flush(self) -> str:
        """Return the tail that was held back, at the end of the text."""
        text, self._held = self._held, ""
        self._forget()
        return text

    def _forget(self) -> None:
        for matcher in self._matchers:
            matcher.n_matched = 0


def _borders(pattern: str) -> list[int]:
    """Return for each prefix the length of its longest proper border."""
    borders = [0] * len(pattern)
    n = 0
    for i in range(1, len(pattern)):
        while n and pattern[n] != pattern[i]:
            n = borders[n - 1]
        n += pattern[n] == pattern[i]
        borders[i] = n
    return borders
