"""Finds stop strings in text that arrives in pieces, whatever the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Scanned", "StopScanner"]


class Scanned(NamedTuple):
    text: str  # safe to show: no later piece can turn it into part of a stop string
    stop: str | None  # the stop string that ended the text


class StopScanner:
    """Holds back only a tail that may still become a stop string: at most max(len(stop)) − 1."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> Scanned:
        """Of several matches, the one that completes first wins; then the one that starts first.

        While not ``armed`` (fewer tokens than min_tokens) everything passes unchecked.
        """
        if not self._stops or not armed:
            text, self._held = self._held + text, ""
            return Scanned(text, None)
        text = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return Scanned(text[: end if self._include else start], stop)
        keep = self._longest_open_tail(text)
        self._held = text[len(text) - keep :]
        return Scanned(text[: len(text) - keep], None)

    def flush(self) -> str:
        """The held tail: the text is over, so it is no stop string any more."""
        text, self._held = self._held, ""
        return text

    def _longest_open_tail(self, text: str) -> int:
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
