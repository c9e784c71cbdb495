"""One catalogue of adapters that many servers read and change, in an object store.

    catalogue = Catalogue.open("s3://bucket/prefix", base)
    content = catalogue.resolve("team:name")    # the name now → digest: a listing and a read
    catalogue.contents.fetch(content, write)    # its files, verified by digest

There is no other copy of the names: whoever reads the catalogue sees what was written last, and
nobody has to be told. An ``AdapterStore`` that is given a catalogue keeps what it needs of it on
its own disk and in memory; most code asks that store. Use this class where there is none: to
resolve names in a gateway, or to look at the catalogue from outside.
"""

from __future__ import annotations

import uuid

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import StoreError, UnknownAdapter
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.name_record import Content

from .bucket import Bucket
from .content_objects import ContentObjects
from .name_log import NameLog
from .name_state import NameState

__all__ = ["Catalogue"]


class Catalogue:
    """Stateless and thread-safe; every call blocks for a network round trip or more.

    Raises CatalogueUnavailable where the object store cannot be used now. Each call ends, with a
    result or an error, within half a minute; a fetch within that for every 8 MiB.
    """

    def __init__(self, bucket: Bucket, limits: StoreLimits = StoreLimits()) -> None:  # noqa: B008
        self._bucket = bucket
        self.names = NameLog(bucket)
        self.contents = ContentObjects(bucket, limits)

    @staticmethod
    def open(
        url: str,  # s3://bucket/prefix, gs://…, az://…, file:///directory
        base: BaseSpec,
        limits: StoreLimits = StoreLimits(),  # noqa: B008  frozen value
    ) -> Catalogue:
        """The part of the catalogue for one base: servers of several may share the URL.

        Connects to nothing yet; credentials come from the environment. Raises StoreError or
        ValueError for what can never work.
        """
        return Catalogue(Bucket.open(url, base.fingerprint[:16]), limits)

    def read(self, name: str) -> NameState:
        """The name as it is now; without revisions if it does not exist."""
        return self.names.read(name)

    def resolve(self, name: str, digest_prefix: str = "") -> Content:
        """What ``name`` is now, or its newest kept revision whose digest begins so.

        Raises UnknownAdapter.
        """
        for revision in self.read(name).revisions:
            if revision.content.digest.startswith(digest_prefix):
                return revision.content
        raise UnknownAdapter(f"{name}@{digest_prefix}" if digest_prefix else name)

    def now(self) -> float:
        """Seconds since the epoch by the clock of the object store: what ages are measured with."""
        key = f"clock/{uuid.uuid4().hex}"
        self._bucket.write(key, b"")
        try:
            found = self._bucket.objects("clock/")
            return next(each.modified for each in found if each.key == key)
        except StopIteration:
            raise StoreError("the object store does not list what was just written") from None
        finally:
            self._bucket.delete([key])

    def claim(self, task: str, turn: int) -> bool:
        """True for one of all who ask for this turn of a task. Turns before it are forgotten."""
        key = f"{task}/{turn:012d}"
        if not self._bucket.create(key, b""):
            return False
        earlier = [each.key for each in self._bucket.objects(f"{task}/") if each.key < key]
        self._bucket.delete(earlier)
        return True
