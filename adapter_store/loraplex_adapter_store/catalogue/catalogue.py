"""A catalogue of adapters that many servers read and change, in an object store.

    catalogue = Catalogue.open("s3://bucket/prefix", base)
    state = catalogue.names.read("team:name")         # its revisions: a listing and a read
    catalogue.contents.fetch(revision.content, write)  # its files, verified by digest

The object store has the only copy of the names, so every reader sees the last change. An
``AdapterStore`` with a catalogue keeps copies on its disk and in memory; most code uses the store.
"""

from __future__ import annotations

import logging
import uuid

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.limits import StoreLimits

from .bucket import Bucket
from .content_objects import ContentObjects
from .name_log import GRACE_S, NameLog

_log = logging.getLogger(__name__)


class Catalogue:
    """Stateless and thread-safe; every call blocks for a network round trip or more.

    Raises CatalogueUnavailable if the object store fails. Each call ends within half a minute; a
    fetch takes at most that for every 8 MiB.
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
        """Open the part of the catalogue for one base: servers of several bases may share the URL.

        Does not connect. Credentials come from the environment. Raises StoreError or ValueError.
        """
        return Catalogue(Bucket.open(url, base.fingerprint[:16]), limits)

    def now(self) -> float:
        """Return seconds since the epoch by the clock of the object store."""
        key = f"clock/{uuid.uuid4().hex}"
        self._bucket.write(key, b"")
        try:
            objects = self._bucket.objects("clock/")
            return next(each.modified for each in objects if each.key == key)
        except StopIteration:
            raise StoreError("the object store does not list what was just written") from None
        finally:
            self._bucket.delete([key])

    def claim(self, task: str, turn: int) -> bool:
        """Return True for the first caller with this turn of a task. Deletes earlier turns."""
        key = f"{task}/{turn:012d}"
        if not self._bucket.create(key, b""):
            return False
        earlier = [each.key for each in self._bucket.objects(f"{task}/") if each.key < key]
        self._bucket.delete(earlier)
        return True


def claim_sweep(catalogue: Catalogue) -> bool:
    """Return True for the first server that calls this within the hour."""
    return catalogue.claim("sweeps", int(catalogue.now() // GRACE_S))


def sweep(catalogue: Catalogue) -> int:
    """Delete old states and the uploads without a name. Returns how many uploads.

    Ages are by the object store's clock.

    Why no upload in use is deleted:

    1. The uploads are listed before the states of all names. Later uploads are not in the list.
    2. An upload younger than ``GRACE_S`` stays. A put points a name at its upload within half of
       that time, or is refused (``SharedContents.usable``): an older one without a name gets none.
    3. No other change starts to refer to an upload: an edit, a pin or a rollback takes the upload
       from the previous state, under compare-and-set. So an upload in a state that is written after
       the listing is in a listed state too. All states count, not only the newest: a request may
       use a digest for ``GRACE_S`` after the name has moved.
    4. A state that cannot be read stops the sweep, since its uploads are unknown.

    Raises CatalogueUnavailable or StoredAdapterDamaged.
    """
    now = catalogue.now()
    uploads = catalogue.contents.uploads()  # before the states, see 1.
    used = {
        (revision.content.digest, revision.content.upload)
        for name in catalogue.names.newest_numbers()
        for state in catalogue.names.states(name, now)
        for revision in state.revisions
    }
    garbage = [
        upload
        for upload in uploads
        if (upload.digest, upload.upload) not in used and now - upload.modified > GRACE_S
    ]
    for upload in garbage:
        catalogue.contents.delete(upload)
    if garbage:
        _log.info("%d contents without a name were deleted from the catalogue", len(garbage))
    return len(garbage)
