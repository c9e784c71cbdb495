"""What a ``DevicePool`` tells the pools of the other ranks of its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from loraplex_adapter_store.plan import AdapterPlan

__all__ = ["NoOtherPools", "OtherPools"]


class OtherPools(Protocol):
    """Every adapter lies on all ranks in the same slots. Engine thread, but for what loads."""

    def open(self, *, n_bytes: int, n_slots: int, max_rank: int) -> None:
        """They make a pool like this one."""

    def load(self, plan: AdapterPlan, first_slot: int) -> Callable[[], None]:
        """What the loader's thread calls to have them load a prepared or a plain plan.

        That returns when all have it, and raises if one of them cannot.
        """

    def publish(self, digest: str) -> None:
        """From the next step on rows may have it."""

    def forget(self, digest: str) -> None:
        """Its place is free, whether its load failed or not."""


class NoOtherPools:
    """Of an engine of one process. Stateless."""

    def open(self, *, n_bytes: int, n_slots: int, max_rank: int) -> None: ...

    def load(self, plan: AdapterPlan, first_slot: int) -> Callable[[], None]:
        return _nothing

    def publish(self, digest: str) -> None: ...

    def forget(self, digest: str) -> None: ...


def _nothing() -> None: ...
