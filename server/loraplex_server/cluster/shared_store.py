"""The store of one process of a cluster: a cache of the catalogue that all of them share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.content_loader import PlanCheck
from loraplex_adapter_store.faults import FaultLog
from loraplex_adapter_store.packed_files import Packer
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.experts import arrow_prototypes
from loraplex_server.settings import ServerConfig

__all__ = ["open_shared_store"]


def open_shared_store(
    config: ServerConfig,
    base: BaseSpec,
    faults: FaultLog,
    folder: Path | None = None,
    *,
    host_bytes: int,
    packer: Packer | None = None,
    check: PlanCheck | None = None,
) -> tuple[AdapterStore, Callable[[], None]]:
    """The store, and what closes it. The catalogue has everything that others need.

    ``folder``: its own; None: a new one, which goes with it. ``packer`` of an engine replica,
    ``check`` of a gateway. Raises StoreError or ValueError.
    """
    url = config.store.catalogue
    assert url is not None  # ``ClusterConfig`` has one always
    root = folder or Path(tempfile.mkdtemp(prefix="loraplex-"))

    def remove() -> None:
        if folder is None:
            shutil.rmtree(root, ignore_errors=True)

    try:
        store = AdapterStore(
            root,
            base,
            host_bytes=host_bytes,
            allowed_roots=[*config.store.adapters_dirs],
            gate_of=arrow_prototypes,
            packer=packer,
            check=check,
            n_kept_revisions=config.store.keep_revisions,
            faults=faults,
            catalogue=Catalogue.open(url, base),
            catalogue_limits=config.store.catalogue_limits,
        )
    except BaseException:
        remove()
        raise

    def close() -> None:
        store.close()
        remove()

    return store, close
