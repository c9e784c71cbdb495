"""Adapters that are there when the server starts: demos and --lora-modules.

Those of --adapters-dir are kept up to date by ``watched_folders``.
"""

from __future__ import annotations

import logging
from importlib.resources import as_file, files

from loraplex_adapter_store.errors import SourceError, StoreError, UnknownAdapter
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.settings import LoraModule, StoreConfig

from .adapter_folders import find_folders, is_being_copied, is_current, is_known, put_folder

__all__ = ["register_adapters"]

_DEMO_PATH = ("loraplex_adapter_store", "demos")
_log = logging.getLogger(__name__)


def register_adapters(store: AdapterStore, config: StoreConfig) -> None:
    """Raises StoreError for a --lora-modules entry that cannot be served.

    Folders that have not changed since they were read for this base are not read again.
    """
    if config.demos:
        _register_demos(store)
    for module in config.lora_modules:
        if not is_current(store, module):
            _register_module(store, module)


def _register_module(store: AdapterStore, module: LoraModule) -> None:
    if not (module.path.is_dir() and is_being_copied(module.path)):
        put_folder(store, module)
    elif is_known(store, module):
        _log.warning(
            "adapter %s: rsync renews %s; what was there before is served until the next start",
            module.name,
            module.path,
        )
    else:
        raise SourceError(
            f"adapter {module.name!r}: rsync copies to {module.path}; start again when it is done, "
            "or remove its temporary file"
        )


def _register_demos(store: AdapterStore) -> None:
    """Shipped for the default base; another base refuses them, which is not worth a warning."""
    source = files(_DEMO_PATH[0]) / _DEMO_PATH[1]
    if not source.is_dir():
        return
    with as_file(source) as folder:
        for module in find_folders(folder):
            try:
                if _is_ours(store, module.name) and not is_current(store, module):
                    put_folder(store, module)
            except StoreError as error:
                _log.debug("demo adapter %s does not fit this base: %s", module.name, error)


def _is_ours(store: AdapterStore, name: str) -> bool:
    """Whether the demo may be put there: the name is new, or its content is the demo's."""
    try:
        path = str(store.get(name).provenance.get("path", ""))
    except UnknownAdapter:
        return not store.history(name)
    return "/".join((*_DEMO_PATH, name)) in path
