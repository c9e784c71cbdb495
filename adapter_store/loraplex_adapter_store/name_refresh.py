"""Brings a store's names up to date with its catalogue, as far as each call needs them.

A store without a catalogue knows its names best itself: then nothing here does anything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .catalogue.catalogue_registry import CatalogueRegistry
from .errors import CatalogueUnavailable
from .name_index import NameIndex
from .names import is_valid_name, tenant_of
from .put_options import PutOptions
from .selector import NameRef

__all__ = ["NameRefresh"]

_log = logging.getLogger(__name__)


class NameRefresh:
    """Thread-safe. Calls may block for the network and raise CatalogueUnavailable."""

    def __init__(self, catalogue: CatalogueRegistry | None, index: NameIndex) -> None:
        self._catalogue = catalogue
        self._index = index

    def is_fresh(self, name: str) -> bool:
        """Takes a microsecond and never waits."""
        return self._catalogue is None or self._catalogue.is_fresh(name)

    def follow(self, name: str) -> None:
        """Before a use: what is known may be a second old."""
        if self._catalogue is not None and is_valid_name(name):
            self._catalogue.follow(name)

    def follow_ref(self, ref: NameRef) -> None:
        """A digest that is here is what it is, whether the catalogue answers or not."""
        try:
            self.follow(ref.name)
        except CatalogueUnavailable:
            if not ref.digest_prefix or self._index.find(ref.name, ref.digest_prefix) is None:
                raise

    def follow_all(self) -> None:
        if self._catalogue is not None:
            self._catalogue.follow_all()

    def follow_at_start(self) -> bool:
        """Whether all names are known. A server starts without its catalogue, too."""
        try:
            self.follow_all()
        except CatalogueUnavailable as error:
            _log.warning("%s; adapters are served when it is back", error)
            return False
        return True

    def refresh(self, name: str) -> None:
        """Before a change, which must not be judged by what is a second old."""
        if self._catalogue is not None:
            self._catalogue.refresh(name)

    def refresh_tenant(self, name: str) -> None:
        """All names of the tenant whose ``name`` is: what its quota is judged by."""
        if self._catalogue is not None:
            self._catalogue.follow_tenant(tenant_of(name))

    def refresh_before_put(self, name: str, options: PutOptions) -> None:
        self.refresh(name)
        if options.quota.max_adapters is not None or options.quota.max_bytes is not None:
            self.refresh_tenant(name)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """What others do to ``name`` is not applied here meanwhile."""
        if self._catalogue is None:
            yield
            return
        with self._catalogue.changing(name):
            yield
