"""From the files of a content to what the host tier keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .base_spec import BaseSpec
from .composite import Composite
from .content_files import PLAN_FILE, ContentFiles
from .errors import BaseMismatch
from .packed_files import PackedFiles, Packer
from .plan import AdapterPlan
from .plan_file import read_plan
from .registry import Content

__all__ = ["ContentLoader"]


class ContentLoader:
    """Reads on the calling thread, mostly outside the interpreter lock. Thread-safe.

    Every byte is checked. Raises BaseMismatch for contents of another base, and
    StoredAdapterDamaged.
    """

    def __init__(
        self,
        base: BaseSpec,
        files: ContentFiles,
        prepared: PackedFiles,
        packer: Packer | None,
        on_prepared: Callable[[AdapterPlan], None],
    ) -> None:
        """``on_prepared`` gets what had to be prepared anew; it must not wait."""
        self._base = base
        self._files = files
        self._prepared = prepared
        self._packer = packer
        self._on_prepared = on_prepared

    def load(self, content: Content) -> AdapterPlan:
        """As it was prepared before, else prepared now."""
        self._check_base(content)
        kept = self._prepared.read(content.digest)
        if kept is not None:
            return kept
        plan = self.prepare(self._read(content))
        if plan.packed_adapter is not None:
            self._on_prepared(plan)
        return plan

    def load_composite(
        self, composite: Composite, parts: Sequence[Content], digest: str
    ) -> AdapterPlan:
        """From the parts' own plans: their prepared forms are rounded, and laid out alone."""
        return self.prepare(composite.build([self._read(part) for part in parts], digest))

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        return plan if self._packer is None else self._packer.prepare(plan)

    def _read(self, content: Content) -> AdapterPlan:
        self._check_base(content)
        path = self._files.path(content.digest) / PLAN_FILE
        return read_plan(path, content.plan_sha256)

    def _check_base(self, content: Content) -> None:
        if content.base_fingerprint != self._base.fingerprint:
            raise BaseMismatch(
                f"adapter {content.digest[:12]} was checked against another base than "
                f"{self._base.model_id}; add it again"
            )
