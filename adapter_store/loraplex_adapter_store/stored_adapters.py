"""The adapters of a state directory, read beside a server that may have it open."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .contents.content_files import PLAN_FILE
from .contents.plan_file import read_plan
from .errors import StoreError
from .names.name_record import Content, NameRecord
from .names.name_registry import REGISTRY_FILE
from .names.registry_salvage import read_registry
from .plan import AdapterPlan


class StoredAdapter(NamedTuple):
    """The current revision of a name."""

    record: NameRecord
    content: Content
    read: Callable[[], AdapterPlan]  # with factors in float32; raises StoredAdapterDamaged


def stored_adapters(root: Path) -> list[StoredAdapter]:
    """Return the adapters by name, without those of a shared catalogue. Changes nothing.

    Raises StoreError if ``root`` is no state directory.
    """
    if not (root / REGISTRY_FILE).is_file():
        raise StoreError(f"{root} is not the state directory of a server: no {REGISTRY_FILE} in it")
    adapters = []
    for _, state in sorted(read_registry(root / REGISTRY_FILE).states.items()):
        if state.current is not None:
            record, content = state.current
            path = root / "contents" / content.digest[:2] / content.digest / PLAN_FILE
            read = partial(read_plan, path, content.plan_sha256)
            adapters.append(StoredAdapter(record, content, read))
    return adapters
