"""All that a put takes besides the content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .quota import NO_QUOTA, Quota
from .report import JsonValue

__all__ = ["PutOptions"]


@dataclass(frozen=True, slots=True)
class PutOptions:
    if_match: str | None = None  # digest the name must have now
    replace: bool = True  # False: the name must not exist
    description: str | None = None
    examples: Sequence[str] = ()  # prompts
    provenance: Mapping[str, JsonValue] | None = None  # None: what the kind of put says itself
    expires: float | None = None  # seconds since the epoch, see ``AdapterStore.expire``
    defaults: Mapping[str, JsonValue] | None = None  # of requests; the server reads them
    quota: Quota = NO_QUOTA  # of the tenant whose name it is
