"""Adapters in folders on disk: which there are, and putting one into the store with its card."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import UnknownAdapter
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.sources.local import OPTIONAL_FILES
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.settings import LoraModule

from .adapter_defaults import DefaultsRefused, read_defaults
from .card_file import cut_description, cut_examples
from .readme import describe

__all__ = [
    "find_folders",
    "is_being_copied",
    "is_current",
    "is_from",
    "is_known",
    "put_folder",
]

# What rsync writes until a file is whole and takes its name, one file after the other.
_TEMPORARY = re.compile(r"\.(.+)\.[A-Za-z0-9]{6}")
_ADAPTER_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, *OPTIONAL_FILES})
_ABANDONED_S = 300.0  # without a write: what an rsync that was killed has left
_log = logging.getLogger(__name__)


def find_folders(root: Path) -> Iterator[LoraModule]:
    """Every ``name/`` and ``org/name/`` below ``root`` with an adapter in it.

    The store says which names it takes, so that a refused one is told. Hidden folders are none.
    """
    for pattern in (f"*/{CONFIG_FILE}", f"*/*/{CONFIG_FILE}"):
        for file in sorted(root.glob(pattern)):
            folder = file.parent.relative_to(root)
            if not any(part.startswith(".") for part in folder.parts):
                yield LoraModule(folder.as_posix(), file.parent)


def put_folder(store: AdapterStore, module: LoraModule) -> AdapterCard:
    """Raises StoreError."""
    told = _told_by_card(module.path)
    description = told.description or describe(module.path)
    return store.put_directory(
        module.name,
        module.path,
        options=PutOptions(description=description, examples=told.examples, defaults=told.defaults),
    )


def is_from(card: AdapterCard, folder: Path) -> bool:
    """Whether ``folder`` is where the adapter was read from."""
    return card.provenance.get("path") == str(folder)


def is_known(store: AdapterStore, module: LoraModule) -> bool:
    """Whether the store has the folder as it once was, folded for the base that is served."""
    return _known_card(store, module) is not None


def is_current(store: AdapterStore, module: LoraModule) -> bool:
    """Whether the store has the folder as it is now, folded for the base that is served."""
    card = _known_card(store, module)
    return card is not None and not _changed_since(module.path, card.created)


def is_being_copied(folder: Path) -> bool:
    """Whether rsync has renewed some files at most: config and weights may not belong together."""
    for file in folder.iterdir():
        match = _TEMPORARY.fullmatch(file.name)
        is_ours = match is not None and match[1] in _ADAPTER_FILES
        if is_ours and time.time() - file.stat().st_ctime < _ABANDONED_S:
            return True
    return False


def _known_card(store: AdapterStore, module: LoraModule) -> AdapterCard | None:
    try:
        card = store.get(module.name)
    except UnknownAdapter:
        return None
    is_known = is_from(card, module.path) and card.base_fingerprint == store.base.fingerprint
    return card if is_known else None


def _changed_since(folder: Path, when: float) -> bool:
    """Whether a file has changed or come after ``when``; by the time that no copy preserves."""
    return any(file.stat().st_ctime >= when for file in (folder, *folder.iterdir()))


class _Told(NamedTuple):
    description: str | None = None
    examples: tuple[str, ...] = ()  # prompts
    defaults: Mapping[str, JsonValue] | None = None  # of requests


def _told_by_card(path: Path) -> _Told:
    """What ``card.json``, as `loraplex train` writes it, says; nothing if there is none."""
    try:
        card = json.loads((path / "card.json").read_text(encoding="utf-8"))
        description, examples = card["description"], card["examples"]
        defaults = card.get("defaults", {})
    except (OSError, ValueError, KeyError, TypeError):
        return _Told()
    if not (isinstance(description, str | None) and isinstance(examples, list)):
        return _Told()
    description = cut_description(description)
    prompts = cut_examples(text for text in examples if isinstance(text, str))
    try:
        read_defaults(defaults)
    except DefaultsRefused as error:
        _log.warning("%s: the defaults of card.json are not used: %s", path.name, error)
        return _Told(description, prompts)
    return _Told(description, prompts, defaults)
