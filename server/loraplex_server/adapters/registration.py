"""Adapters that are there when the server starts: demos, --adapters-dir, --lora-modules."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names import is_valid_name
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.settings import LoraModule, StoreConfig

from .readme import describe

__all__ = ["register_adapters"]

_CONFIG_FILE = "adapter_config.json"
_log = logging.getLogger(__name__)


def register_adapters(store: AdapterStore, config: StoreConfig) -> None:
    """What cannot be served is logged and skipped, but a --lora-modules entry stops the start.

    Raises StoreError. Directories that have not changed since they were read are not read again.
    """
    if config.demos:
        _register_demos(store)
    for root in config.adapters_dirs:
        for module in _found_below(root):
            try:
                _register(store, module)
            except StoreError as error:
                _log.error("adapter %s in %s is not served: %s", module.name, module.path, error)
    for module in config.lora_modules:
        _register(store, module)


def _register_demos(store: AdapterStore) -> None:
    """Shipped for the default base; another base refuses them, which is no news."""
    source = files("loraplex_adapter_store") / "demos"
    if not source.is_dir():
        return
    with as_file(source) as folder:
        for module in _found_below(folder):
            try:
                _register(store, module)
            except StoreError as error:
                _log.debug("demo adapter %s does not fit this base: %s", module.name, error)


def _found_below(root: Path) -> Iterator[LoraModule]:
    """Every ``name/`` and ``org/name/`` with an adapter in it."""
    if not root.is_dir():
        _log.warning("the adapters directory %s does not exist", root)
        return
    for pattern in (f"*/{_CONFIG_FILE}", f"*/*/{_CONFIG_FILE}"):
        for file in sorted(root.glob(pattern)):
            name = file.parent.relative_to(root).as_posix()
            if is_valid_name(name):
                yield LoraModule(name, file.parent)


def _register(store: AdapterStore, module: LoraModule) -> None:
    if not _is_current(store, module):
        told = _told_by_card(module.path)
        description = told.description or describe(module.path)
        store.put_directory(
            module.name, module.path, description=description, examples=told.examples
        )


def _is_current(store: AdapterStore, module: LoraModule) -> bool:
    try:
        card = store.get(module.name)
    except StoreError:
        return False
    if card.provenance.get("path") != str(module.path):
        return False
    return all(file.stat().st_mtime < card.created for file in module.path.iterdir())


class _Told(NamedTuple):
    description: str | None = None
    examples: tuple[str, ...] = ()  # prompts


def _told_by_card(path: Path) -> _Told:
    """What ``card.json``, as `loraplex train` writes it, says; nothing if there is none."""
    try:
        card = json.loads((path / "card.json").read_text(encoding="utf-8"))
        description, examples = card["description"], card["examples"]
    except (OSError, ValueError, KeyError, TypeError):
        return _Told()
    if not (isinstance(description, str | None) and isinstance(examples, list)):
        return _Told()
    return _Told(description, tuple(text for text in examples if isinstance(text, str)))
