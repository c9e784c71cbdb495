"""Errors of the adapter store.

StoreError
├── AdapterRefused          it cannot be served as a whole: nothing was stored, nothing changed
│   ├── MalformedFile       not a safetensors file, broken header, truncated, not finite, bad JSON
│   ├── PickleRefused       .bin, .pt …: never opened
│   ├── UnsupportedAdapter  a method or feature that cannot be served exactly; says which and why
│   ├── AdapterMismatch     tensors unexpected, missing or of the wrong shape; names them
│   ├── LimitExceeded       rank, bytes or counts above the limits
│   └── BaseMismatch        trained for another base model
├── InvalidName             not an adapter name
├── InvalidSelector         a request's ``adapter`` value that means nothing, or cannot be mixed
├── UnknownAdapter          no such name or digest; names what exists
├── QuotaExceeded           the tenant has as much as it may
├── RevisionConflict        compare-and-set failed: the name moved, or exists already
├── SourceError             the source could not be read
│   └── SourceForbidden     the source lies outside what the operator allowed
├── UnservableAdapter       stored by another server; the engine of this one cannot apply it
├── HostTierFull            the plan cannot fit beside the leased and pinned ones
├── AdapterInUse            requests use it: it stays in memory until they have ended
├── AdapterPinned           it stays in memory until it is unpinned
├── StoredAdapterDamaged    bytes on disk no longer match their digest
├── CatalogueUnavailable    the object store of the catalogue does not answer; try again
├── LoadCancelled           who asked for the adapter left before it was here
└── StoreClosed             the store was closed
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

__all__ = [
    "AdapterInUse",
    "AdapterMismatch",
    "AdapterPinned",
    "AdapterRefused",
    "BaseMismatch",
    "CatalogueUnavailable",
    "HostTierFull",
    "InvalidName",
    "InvalidSelector",
    "LimitExceeded",
    "LoadCancelled",
    "MalformedFile",
    "PickleRefused",
    "QuotaExceeded",
    "RevisionConflict",
    "SourceError",
    "SourceForbidden",
    "StoreClosed",
    "StoreError",
    "StoredAdapterDamaged",
    "UnknownAdapter",
    "UnservableAdapter",
    "UnsupportedAdapter",
]

_SHOWN = 8


class StoreError(Exception):
    """Base of all errors raised by the store."""


class AdapterRefused(StoreError):
    """The adapter was not accepted. ``problems`` lists every reason found, one line each."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        shown = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        super().__init__(message + shown + more)
        self.problems: tuple[str, ...] = tuple(problems) or (message,)


class MalformedFile(AdapterRefused):
    pass


class PickleRefused(AdapterRefused):
    pass


class UnsupportedAdapter(AdapterRefused):
    pass


class AdapterMismatch(AdapterRefused):
    """``unexpected_keys``: tensors nobody claims; ``missing_keys``: those the config promises."""

    def __init__(
        self,
        message: str,
        problems: Sequence[str] = (),
        *,
        unexpected_keys: Sequence[str] = (),
        missing_keys: Sequence[str] = (),
    ) -> None:
        super().__init__(message, problems)
        self.unexpected_keys = tuple(unexpected_keys)
        self.missing_keys = tuple(missing_keys)


class LimitExceeded(AdapterRefused):
    pass


class BaseMismatch(AdapterRefused):
    pass


class InvalidName(StoreError):
    pass


class InvalidSelector(StoreError):
    pass


class UnknownAdapter(StoreError):
    """``name`` as asked for, ``closest`` registered names (at most five)."""

    def __init__(self, name: str, closest: Sequence[str] = (), n_registered: int = 0) -> None:
        if closest:
            hint = f"closest registered: {', '.join(closest)}"
        elif n_registered:
            hint = f"none of the {n_registered} registered names is similar"
        else:
            hint = "no adapters are registered"
        super().__init__(f"adapter {name!r} does not exist; {hint}")
        self.name = name
        self.closest = tuple(closest)


class QuotaExceeded(StoreError):
    pass


class Named(Protocol):
    """What a name has: a record, or a card."""

    @property
    def digest(self) -> str: ...

    @property
    def etag(self) -> str: ...


class RevisionConflict(StoreError):
    """``digest`` and ``etag`` are those of what the name has now, None if it does not exist."""

    def __init__(self, message: str, now: Named | None) -> None:
        super().__init__(message)
        self.digest = None if now is None else now.digest
        self.etag = None if now is None else now.etag


class SourceError(StoreError):
    pass


class SourceForbidden(SourceError):
    pass


class UnservableAdapter(StoreError):
    pass


class HostTierFull(StoreError):
    pass


class AdapterInUse(StoreError):
    def __init__(self, name: str, n_uses: int) -> None:
        use = "request uses" if n_uses == 1 else "requests use"
        super().__init__(
            f"{n_uses} {use} adapter {name!r}, which stays in memory meanwhile; "
            "wait for them to end, or cancel them, then unload it"
        )


class AdapterPinned(StoreError):
    """``pinned``: the name that is pinned, of the same content."""

    def __init__(self, name: str, pinned: str) -> None:
        why = "is pinned" if name == pinned else f"has the content of {pinned!r}, which is pinned"
        super().__init__(f"adapter {name!r} {why}; unpin {pinned!r}, then unload it")


class StoredAdapterDamaged(StoreError):
    pass


class CatalogueUnavailable(StoreError):
    """After a change: whether it was made is not known; ask for the adapter to see."""


class LoadCancelled(StoreError):
    @classmethod
    def raise_if(cls, cancelled: threading.Event | None) -> None:
        if cancelled is not None and cancelled.is_set():
            raise cls("the request that asked for the adapter has gone")


class StoreClosed(StoreError):
    pass
