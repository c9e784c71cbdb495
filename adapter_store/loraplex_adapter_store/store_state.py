"""The state that the parts of one store share."""

import threading
from dataclasses import dataclass, field

from .base_spec import BaseSpec
from .contents.content_files import ContentFiles
from .contents.packed_files import PackedFiles
from .errors import StoreClosed
from .limits import StoreLimits
from .names.name_index import NameIndex
from .names.name_registry import NameRegistry
from .tiers.host_tier import HostTier


@dataclass(frozen=True, slots=True)
class StoreState:
    """Names, files and memory of a store. Each part is thread-safe."""

    base: BaseSpec
    limits: StoreLimits
    registry: NameRegistry  # the names on disk or in the catalogue
    index: NameIndex  # the names in memory
    files: ContentFiles
    packed: PackedFiles
    tier: HostTier
    writing: threading.RLock = field(default_factory=threading.RLock)  # for index and files
    closed: threading.Event = field(default_factory=threading.Event)

    def check_open(self) -> None:
        """Raises StoreClosed."""
        if self.closed.is_set():
            raise StoreClosed("the adapter store is closed")
