"""Plans in the engine's form, kept beside their contents so that loads to come take less time."""

from __future__ import annotations

import logging
import threading

from .faults import FaultLog
from .name_index import NameIndex
from .packed_files import PackedFiles
from .plan import AdapterPlan

__all__ = ["PackedPlans"]

_log = logging.getLogger(__name__)


class PackedPlans:
    """Thread-safe. It is a cache: a plan that cannot be kept is a warning, and a fault."""

    def __init__(
        self, files: PackedFiles, index: NameIndex, writing: threading.RLock, faults: FaultLog
    ) -> None:
        self._files = files
        self._index = index
        self._writing = writing
        self._faults = faults

    def keep(self, plan: AdapterPlan, plan_sha256: str) -> None:
        """``plan_sha256``: of the plan that this one was prepared from."""
        if plan.packed_adapter is None:
            return
        try:
            staged = self._files.stage(plan, plan_sha256)
            with self._writing:
                content = self._index.content(plan.digest)
                if content is None or content.plan_sha256 != plan_sha256:  # gone, or folded anew
                    self._files.discard(staged)
                else:
                    self._files.publish(staged, plan.digest)
            self._faults.worked("storage")
        except OSError as error:
            self._faults.failed("storage", error)
            _log.warning(
                "adapter %s is not kept in prepared form, its loads from disk take longer: %s",
                plan.digest[:12],
                error,
            )
