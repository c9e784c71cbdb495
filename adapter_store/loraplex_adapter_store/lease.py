"""The right to use one content while a request runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .name_record import Content
from .plan import AdapterPlan
from .report import JsonValue
from .selector import Library, Mixture

__all__ = ["AdapterLease", "AdapterRecipe"]


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """What a leased plan is made of, so that another process can make the same one."""

    contents: tuple[Content, ...]  # in the order of the selector's names
    selector: Mixture | Library | None = None  # how they are combined; None: the one as it is
    tenant: str = ""  # whose memory the combined plan takes


class AdapterLease:
    """The right to use one content while a request runs. Release it, or use ``with``.

    ``revision`` is 0 for a mixture; its ``name`` is the mixture in words.
    """

    __slots__ = (
        "_on_release",
        "_released",
        "defaults",
        "digest",
        "name",
        "plan",
        "recipe",
        "revision",
    )

    def __init__(
        self,
        name: str,
        revision: int,
        plan: AdapterPlan,
        on_release: Callable[[str], None],
        recipe: AdapterRecipe,
        defaults: Mapping[str, JsonValue] = MappingProxyType({}),
    ) -> None:
        """``defaults``: of the name's card."""
        self.name = name
        self.digest = plan.digest
        self.revision = revision
        self.plan = plan
        self.recipe = recipe
        self.defaults = defaults
        self._on_release = on_release
        self._released = threading.Lock()

    def release(self) -> None:
        """Gives the lease back; later calls do nothing. Any thread, never blocks."""
        if self._released.acquire(blocking=False):
            self._on_release(self.digest)

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
