"""Errors of the adapter store.

StoreError
├── AdapterRefused          the adapter cannot be served: nothing was stored or changed
│   ├── MalformedFile       not a safetensors file, broken header, truncated, not finite, bad JSON
│   ├── PickleRefused       .bin, .pt …: never opened
│   ├── UnsupportedAdapter  a method or feature that cannot be served exactly
│   ├── AdapterMismatch     tensors unexpected, missing or of the wrong shape
│   ├── LimitExceeded       rank, bytes or counts above the limits
│   └── BaseMismatch        trained for another base model
├── InvalidName             not an adapter name
├── InvalidSelector         a request's ``adapter`` value is invalid or cannot be mixed
├── UnknownAdapter          no such name or digest
├── QuotaExceeded           the tenant has reached a limit
├── RevisionConflict        the name moved or exists already
├── SourceError             the source could not be read
│   └── SourceForbidden     the operator does not allow the source
├── UnservableAdapter       another server stored the adapter, and this engine cannot apply it
├── HostTierFull            the plan does not fit beside the leased and pinned plans
├── AdapterInUse            running requests keep the adapter in memory
├── AdapterPinned           the adapter stays in memory until it is unpinned
├── StoredAdapterDamaged    bytes on disk do not match their digest
├── CatalogueUnavailable    the object store of the catalogue does not answer
├── LoadCancelled           the request ended before its adapter was loaded
└── StoreClosed             the store was closed
"""

import threading
from collections.abc import Sequence
from typing import Protocol

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
    """The tensors do not fit the config. ``missing_keys`` are tensors that the config promises."""

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
    """No adapter has this ``name``. ``closest`` has at most five similar names."""

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
    """A record or a card of a name."""

    @property
    def digest(self) -> str: ...

    @property
    def etag(self) -> str: ...


class RevisionConflict(StoreError):
    """``digest`` and ``etag`` are the name's current ones, or None if the name does not exist."""

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
    """The content is pinned, under the name ``pinned``."""

    def __init__(self, name: str, pinned: str) -> None:
        why = "is pinned" if name == pinned else f"has the content of {pinned!r}, which is pinned"
        super().__init__(f"adapter {name!r} {why}; unpin {pinned!r}, then unload it")


class StoredAdapterDamaged(StoreError):
    pass


class CatalogueUnavailable(StoreError):
    """A change may or may not have been made. Get the adapter to find out."""


class LoadCancelled(StoreError):
    @classmethod
    def raise_if(cls, cancelled: threading.Event | None) -> None:
        if cancelled is not None and cancelled.is_set():
            raise cls("the request that asked for the adapter has gone")


class StoreClosed(StoreError):
    pass
