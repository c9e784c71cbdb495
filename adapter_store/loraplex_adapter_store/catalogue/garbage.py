"""Deletes from the catalogue what nothing refers to: uploads without a name, and old states.

Why nothing that is in use, or about to be, goes:

1. The uploads are listed first, then the states of all names. What is uploaded later is not listed.
2. An upload younger than ``GRACE_S`` stays. A put points a name at its upload within half of that,
   or is refused (``CatalogueRegistry``), so an older one without a name gets none from its put.
3. Nobody else starts to refer to an upload: an edit, a pin or a rollback takes it from the state
   before, under compare-and-set. So if an upload is in a state that is written after the listing,
   it was in one that is listed too. Each state that is there counts, not only the newest: a request
   keeps a digest for ``GRACE_S`` after the name has let it go.
4. A state that cannot be read stops the sweep: who knows what it refers to.

Ages are measured by the clock of the object store.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from .catalogue import Catalogue
from .name_log import GRACE_S

__all__ = ["Swept", "claim_sweep", "sweep"]

_log = logging.getLogger(__name__)


class Swept(NamedTuple):
    n_uploads: int  # deleted
    n_kept: int  # uploads that stay


def claim_sweep(catalogue: Catalogue) -> bool:
    """Whether this server is the one that sweeps in this hour; of all that ask one is."""
    return catalogue.claim("sweeps", int(catalogue.now() // GRACE_S))


def sweep(catalogue: Catalogue) -> Swept:
    """Raises CatalogueUnavailable or StoredAdapterDamaged; what was deleted by then was garbage."""
    now = catalogue.now()
    uploads = catalogue.contents.uploads()
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
    return Swept(len(garbage), len(uploads) - len(garbage))
