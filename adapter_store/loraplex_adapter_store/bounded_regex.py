"""Regular expressions out of uploaded configs: what one adapter may spend on them is bounded.

``regex`` instead of ``re``: it has a timeout, and releases the interpreter lock while it matches.
"""

from __future__ import annotations

import time

import regex

from .errors import MalformedFile

__all__ = ["BoundedRegex"]

_MAX_PATTERN = 2000  # characters
_BUDGET_S = 2.0  # of all matches of one adapter


class BoundedRegex:
    """Belongs to one adapter being read. Raises MalformedFile once the time is spent."""

    def __init__(self) -> None:
        self._left_s = _BUDGET_S

    def match(self, pattern: str, name: str) -> regex.Match[str] | None:
        """``re.match``. Raises MalformedFile for a pattern that is too long, broken or too slow."""
        if len(pattern) > _MAX_PATTERN:
            raise MalformedFile(
                f"adapter_config.json: pattern {pattern[:80]!r}… has {len(pattern)} characters, "
                f"at most {_MAX_PATTERN} are matched"
            )
        started = time.monotonic()
        try:
            return regex.match(pattern, name, timeout=max(self._left_s, 1e-3), concurrent=True)
        except regex.error as error:
            raise MalformedFile(f"adapter_config.json: bad pattern {pattern!r}: {error}") from None
        except TimeoutError:
            raise MalformedFile(
                f"adapter_config.json: pattern {pattern[:80]!r} takes too long to match; "
                "list the modules instead"
            ) from None
        finally:
            self._left_s -= time.monotonic() - started
