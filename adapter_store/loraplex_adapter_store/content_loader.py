"""From the files of a content to what the host tier keeps of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from .base_spec import BaseSpec
from .composite import Composite
from .content_files import PLAN_FILE
from .errors import AdapterRefused, BaseMismatch, StoredAdapterDamaged, UnservableAdapter
from .name_record import Content
from .packed_files import PackedFiles, Packer
from .plan import AdapterPlan
from .plan_file import peek_plan, read_plan

__all__ = ["ContentFolders", "ContentLoader", "PlanCheck", "RemoteContents"]

PlanCheck = Callable[[AdapterPlan], None]  # raises AdapterRefused for what cannot be served


class ContentFolders(Protocol):
    """Where the files of contents lie."""

    def path(self, digest: str) -> Path:
        """The folder of a content."""


class RemoteContents(Protocol):
    """Where the files of a content come from that are not on this disk. Calls block."""

    def ensure(self, content: Content, cancelled: threading.Event | None = None) -> None:
        """They are on the disk when it returns. Raises StoreError."""

    def touch(self, digest: str) -> None:
        """A load was served from what was prepared of it before. Takes a microsecond."""

    def fetch_again(self, content: Content, cancelled: threading.Event | None = None) -> None:
        """Like ``ensure``, in place of files that are damaged. Raises StoreError."""


class ContentLoader:
    """Reads on the calling thread, mostly outside the interpreter lock. Thread-safe.

    Every byte is checked. Raises BaseMismatch for contents of another base, UnservableAdapter for
    those that ``check`` or the packer refuses, and StoredAdapterDamaged.
    """

    def __init__(
        self,
        base: BaseSpec,
        files: ContentFolders,
        prepared: PackedFiles,
        packer: Packer | None,
        check: PlanCheck | None,
        on_prepared: Callable[[AdapterPlan, str], None],
        remote: RemoteContents | None = None,
    ) -> None:
        """``check``: as of ``AdapterStore``; by default the packer's.

        ``on_prepared`` gets what had to be prepared anew, and the hash of the plan that it was
        prepared from; it must not wait.
        """
        self._base = base
        self._files = files
        self._prepared = prepared
        self._packer = packer
        self._check = packer.check if check is None and packer is not None else check
        self._on_prepared = on_prepared
        self._remote = remote

    def load(self, content: Content, cancelled: threading.Event | None = None) -> AdapterPlan:
        """As it was prepared before, else prepared now.

        ``cancelled`` ends a fetch from elsewhere: then it raises LoadCancelled.
        """
        self._check_base(content)
        kept = self._prepared.read(content)
        if kept is not None:
            if self._remote is not None:
                self._remote.touch(content.digest)
            with _as_unservable():
                self._check_plan(kept)
            return kept
        read = self._read(content, cancelled)
        with _as_unservable():
            plan = self.prepare(read)
        if plan.packed_adapter is not None:
            self._on_prepared(plan, content.plan_sha256)
        return plan

    def composite_bytes(self, composite: Composite, parts: Sequence[Content], digest: str) -> int:
        """Of what is built before it is prepared. Reads names and shapes: milliseconds.

        Raises what ``load_composite`` raises for ranks and for parts that do not combine.
        """
        if composite.outline is None:
            return sum(part.host_bytes for part in parts)
        outline = composite.outline([self._from_file(part, peek_plan) for part in parts], digest)
        with _as_unservable():
            self._check_plan(outline)
        return outline.n_bytes

    def load_composite(
        self, composite: Composite, parts: Sequence[Content], digest: str
    ) -> AdapterPlan:
        """From the parts' own plans: their prepared forms are rounded, and laid out alone."""
        built = composite.build([self._read(part) for part in parts], digest)
        with _as_unservable():
            return self.prepare(built)

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        """Raises AdapterRefused."""
        self._check_plan(plan)
        return plan if self._packer is None else self._packer.prepare(plan)

    def refusal(self, content: Content) -> str | None:
        """Why a content that was stored earlier cannot be served; None if it can.

        Looks at names and shapes only: a millisecond or two. What is not on this disk is not
        looked at before it is.
        """
        path = self._files.path(content.digest) / PLAN_FILE
        try:
            self._check_base(content)
            if self._remote is None or path.exists():
                self._check_plan(peek_plan(path))
        except AdapterRefused as error:
            return str(error)
        except StoredAdapterDamaged as error:
            return None if self._remote is not None else str(error)  # it is fetched again
        return None

    def _check_plan(self, plan: AdapterPlan) -> None:
        if self._check is not None:
            self._check(plan)

    def _read(self, content: Content, cancelled: threading.Event | None = None) -> AdapterPlan:
        read = partial(read_plan, sha256=content.plan_sha256)
        return self._from_file(content, read, cancelled)

    def _from_file(
        self,
        content: Content,
        read: Callable[[Path], AdapterPlan],
        cancelled: threading.Event | None = None,
    ) -> AdapterPlan:
        self._check_base(content)
        path = self._files.path(content.digest) / PLAN_FILE
        if self._remote is None:
            return read(path)
        self._remote.ensure(content, cancelled)
        try:
            return read(path)
        except StoredAdapterDamaged:  # or evicted between the two, or folded otherwise there
            self._remote.fetch_again(content, cancelled)
            return read(path)

    def _check_base(self, content: Content) -> None:
        if content.base_fingerprint != self._base.fingerprint:
            raise BaseMismatch(
                f"adapter {content.digest[:12]} was checked against another base than "
                f"{self._base.model_id}; add it again"
            )


@contextmanager
def _as_unservable() -> Iterator[None]:
    """What is refused only now was stored by a server that could serve it, or thought so."""
    try:
        yield
    except AdapterRefused as error:
        raise UnservableAdapter(str(error)) from error
