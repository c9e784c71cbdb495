"""Puts the adapters of folders into the store: demos, --lora-modules and folders of --adapters-dir.

The description of an adapter without a card comes from its README, for the card and for ``auto``.
``watched_folders`` watches --adapters-dir.
"""

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

from loraplex_adapter_store.contents.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.errors import SourceError, StoreError, UnknownAdapter
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.sources.local import OPTIONAL_FILES
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.errors import ApiError
from loraplex_server.settings.config import LoraModule, StoreConfig

from .card_file import fill_from_card

# The name of a file that rsync still writes.
_TEMPORARY = re.compile(r"\.(.+)\.[A-Za-z0-9]{6}")
_ADAPTER_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, *OPTIONAL_FILES})
_ABANDONED_S = 300.0  # a file without writes for this long was left by a killed rsync
_DEMO_PATH = ("loraplex_adapter_store", "demos")
_MAX_CHARACTERS = 300  # of a description from a README
_NO_PROSE = re.compile(r"<!--.*?-->|^```.*?^```|^---\n.*?^---$", re.DOTALL | re.MULTILINE)

# Beginnings of sentences that libraries (PEFT, transformers, TRL) write. They name no task.
_BOILERPLATE = (
    "Users (both direct and downstream) should be made aware",
    "Use the code below to get started",
    "Carbon emissions can be estimated",
    "More information needed",
    "This model is a fine-tuned version of",
    "This model was trained with",
    "This modelcard aims to be a base template",
    "It achieves the following results",
    "It has been trained using",
    "The following ",  # hyperparameters, quantization config
    "Cite ",
)
_log = logging.getLogger(__name__)


def register_adapters(store: AdapterStore, config: StoreConfig) -> None:
    """Add demos and --lora-modules. Unchanged folders are not read again.

    Raises StoreError for a --lora-modules entry that cannot be served.
    """
    if config.demos:
        _register_demos(store)
    for module in config.lora_modules:
        if not is_current(store, module):
            _register_module(store, module)


def find_folders(root: Path) -> Iterator[LoraModule]:
    """Yield every ``name/`` and ``org/name/`` below ``root`` that holds an adapter.

    Hidden folders are skipped. The store refuses invalid names.
    """
    for pattern in (f"*/{CONFIG_FILE}", f"*/*/{CONFIG_FILE}"):
        for file in sorted(root.glob(pattern)):
            folder = file.parent.relative_to(root)
            if not any(part.startswith(".") for part in folder.parts):
                yield LoraModule(folder.as_posix(), file.parent)


def put_folder(store: AdapterStore, module: LoraModule) -> AdapterCard:
    """Store the adapter of a folder. Raises StoreError."""
    options = _options_of_card(module.path)
    if not options.description:
        options = replace(options, description=describe(module.path))
    return store.put_directory(module.name, module.path, options=options)


def is_from(card: AdapterCard, folder: Path) -> bool:
    """Return True if the adapter was read from ``folder``."""
    return card.provenance.get("path") == str(folder)


def is_current(store: AdapterStore, module: LoraModule) -> bool:
    """Return True if the store has the current files of the folder, for the served base."""
    card = _known_card(store, module)
    return card is not None and not _changed_since(module.path, card.created)


def is_being_copied(folder: Path) -> bool:
    """Return True while rsync writes to the folder: its files may not belong together yet."""
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
    """Return True if a file changed after ``when``. A copy does not preserve ctime."""
    return any(file.stat().st_ctime >= when for file in (folder, *folder.iterdir()))


def _options_of_card(folder: Path) -> PutOptions:
    """Read card.json, as `loraplex train` writes it. A malformed card is logged and ignored."""
    try:
        return fill_from_card((folder / "card.json").read_bytes(), PutOptions())
    except OSError:
        return PutOptions()
    except ApiError as error:
        _log.warning("the card of %s is not used: %s", folder.name, error.message)
        return PutOptions()


def describe(folder: Path) -> str | None:
    """Return the first line of prose that a person wrote, at most 300 characters, or None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in _NO_PROSE.sub("", text).splitlines():
        line = line.strip()
        if line[:1].isalpha() and not line.startswith(_BOILERPLATE):
            return line[:_MAX_CHARACTERS]
    return None


def _register_module(store: AdapterStore, module: LoraModule) -> None:
    if not (module.path.is_dir() and is_being_copied(module.path)):
        put_folder(store, module)
    elif _known_card(store, module) is not None:
        _log.warning(
            "adapter %s: rsync writes to %s; the older files are served until the next start",
            module.name,
            module.path,
        )
    else:
        raise SourceError(
            f"adapter {module.name!r}: rsync copies to {module.path}; start again when it is done, "
            "or remove its temporary file"
        )


def _register_demos(store: AdapterStore) -> None:
    """Add the demos of the package. Bases that they do not fit refuse them silently."""
    source = files(_DEMO_PATH[0]) / _DEMO_PATH[1]
    if not source.is_dir():
        return
    with as_file(source) as folder:
        for module in find_folders(folder):
            try:
                if _is_free_for_demo(store, module.name) and not is_current(store, module):
                    put_folder(store, module)
            except StoreError as error:
                _log.debug("demo adapter %s does not fit this base: %s", module.name, error)


def _is_free_for_demo(store: AdapterStore, name: str) -> bool:
    """Return True if the name is new or belongs to the demo."""
    try:
        path = str(store.get(name).provenance.get("path", ""))
    except UnknownAdapter:
        return not store.history(name)
    return "/".join((*_DEMO_PATH, name)) in path
