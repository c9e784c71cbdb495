"""A directory on this machine, read without following links out of allowed roots."""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from loraplex_adapter_store.contents.content_files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
)
from loraplex_adapter_store.errors import (
    LimitExceeded,
    PickleRefused,
    SourceError,
    SourceForbidden,
    UnsupportedAdapter,
)
from loraplex_adapter_store.files.file_names import COMPANION_FILES, is_pickle_name
from loraplex_adapter_store.limits import StoreLimits

_CARD_FILE = "card.json"  # options for the name; not part of the adapter
OPTIONAL_FILES = (CHAT_TEMPLATE_FILE, _CARD_FILE, *COMPANION_FILES)  # of a source
_FULL_WEIGHTS = "model.safetensors"  # a fine-tuned model, served as its difference from the base
_FULL_CONFIG = b'{"peft_type": "FULL"}'


@dataclass(frozen=True, slots=True)
class LocalFiles:
    config: bytes
    weights: Path
    chat_template: str | None
    companions: Mapping[str, bytes] = field(default_factory=dict)

    def open_weights(self) -> BinaryIO:
        return _open_regular(self.weights)


def read_directory(path: Path, limits: StoreLimits) -> LocalFiles:
    """Read the files of an adapter. Raises SourceError, PickleRefused or UnsupportedAdapter."""
    if not path.is_dir():
        raise SourceError(f"{path.name!r} is not a directory")
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise SourceError(f"cannot read {path.name!r}: {error.strerror}") from None
    if CONFIG_FILE not in names and {"config.json", _FULL_WEIGHTS} <= names:
        return LocalFiles(_FULL_CONFIG, path / _FULL_WEIGHTS, _template(path, names, limits))
    config_name = CONFIG_FILE if CONFIG_FILE in names else "mixlora_config.json"
    if config_name not in names:
        raise SourceError(f"{path.name!r} has no {CONFIG_FILE}")
    if WEIGHTS_FILE not in names:
        raise _no_weights(path, names)
    config = _read(path / config_name, limits.max_config_bytes)
    template = _template(path, names, limits)
    return LocalFiles(config, path / WEIGHTS_FILE, template, _companions(path, limits))


def read_card(files: LocalFiles, limits: StoreLimits) -> bytes | None:
    """Return the card.json beside the weights, if any. Raises SourceError or LimitExceeded."""
    path = files.weights.parent / _CARD_FILE
    return _read(path, limits.max_config_bytes) if path.exists() else None


def contained(path: Path, allowed: Sequence[Path]) -> Path:
    """Return ``path`` with symlinks resolved. Raises SourceForbidden unless it is allowed."""
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in allowed):
        raise SourceForbidden(
            f"{path.name!r} is outside the directories that may be read; --adapters-dir adds one"
        )
    if real.is_dir():
        nested = (real / name for name in COMPANION_FILES if "/" in name)
        for entry in (*real.iterdir(), *(path for path in nested if path.exists())):
            target = entry.resolve()
            if not any(target.is_relative_to(root) for root in allowed):
                raise SourceForbidden(f"{entry.name} is a link that leaves the allowed roots")
    return real


def _template(path: Path, names: set[str], limits: StoreLimits) -> str | None:
    if CHAT_TEMPLATE_FILE not in names:
        return None
    try:
        return _read(path / CHAT_TEMPLATE_FILE, limits.max_config_bytes).decode()
    except UnicodeDecodeError:
        raise SourceError(f"{CHAT_TEMPLATE_FILE} is not UTF-8") from None


def _companions(path: Path, limits: StoreLimits) -> dict[str, bytes]:
    present = [name for name in COMPANION_FILES if (path / name).exists()]
    return {name: _read(path / name, limits.max_config_bytes) for name in present}


def _no_weights(path: Path, names: set[str]) -> SourceError | PickleRefused | UnsupportedAdapter:
    pickles = sorted(name for name in names if is_pickle_name(name))
    if pickles:
        return PickleRefused(
            f"{path.name!r} holds {pickles[0]}, a pickle: it is never opened here; run "
            f"`loraplex adapters convert` on the directory to turn it into safetensors"
        )
    if any(name.endswith(".safetensors.index.json") for name in names):
        return UnsupportedAdapter(f"{path.name!r} is sharded over several files; save it in one")
    return SourceError(f"{path.name!r} has no {WEIGHTS_FILE}")


def _read(path: Path, max_bytes: int) -> bytes:
    with _open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise LimitExceeded(f"{path.name} exceeds {max_bytes} bytes")
    return data


def _open_regular(path: Path) -> BinaryIO:
    """Open without blocking on pipes or devices. Raises SourceError unless the file is regular."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"cannot read {path.name}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise SourceError(f"{path.name} is not a regular file")
    return os.fdopen(handle, "rb")
