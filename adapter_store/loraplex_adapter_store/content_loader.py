"""Loads contents from disk into the form that the host tier keeps."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .catalogue.shared_contents import LocalContents
from .composites.composite import Composite
from .contents.content_files import PLAN_FILE
from .contents.packed_files import Packer
from .contents.plan_file import peek_plan, read_plan
from .errors import AdapterRefused, BaseMismatch, StoredAdapterDamaged, UnservableAdapter
from .garbage_collector import GarbageCollector
from .names.name_record import Content
from .part_log import worked
from .plan import AdapterPlan
from .store_state import StoreState

_log = logging.getLogger(__name__)
PlanCheck = Callable[[AdapterPlan], None]  # raises AdapterRefused


class ContentLoader:
    """Reads on the calling thread, mostly outside the interpreter lock. Thread-safe.

    Checks every byte. Raises BaseMismatch for contents of another base, UnservableAdapter if
    ``check`` or the packer refuses the plan, and StoredAdapterDamaged.
    """

    def __init__(
        self,
        state: StoreState,
        garbage: GarbageCollector,
        packer: Packer | None,
        check: PlanCheck | None,
        local: LocalContents | None,
    ) -> None:
        """``check`` is the packer's by default. ``local``: contents of the catalogue."""
        self._state = state
        self._garbage = garbage
        self._packer = packer
        self._check = packer.check if check is None and packer is not None else check
        self._local = local

    def load(self, content: Content, cancelled: threading.Event | None = None) -> AdapterPlan:
        """Load the prepared plan, or prepare it.

        Raises LoadCancelled if ``cancelled`` is set during a fetch.
        """
        self._check_base(content)
        prepared = self._state.packed.read(content)
        if prepared is not None:
            if self._local is not None:
                self._local.touch(content.digest)
            with _as_unservable():
                self._check_plan(prepared)
            return prepared
        stored = self.read(content, cancelled)
        with _as_unservable():
            plan = self.prepare(stored)
        self._garbage.later(partial(self.keep_prepared, plan, content.plan_sha256))
        return plan

    def keep_prepared(self, plan: AdapterPlan, plan_sha256: str) -> None:
        """Write the prepared form to disk, for later loads. A failure is only logged.

        ``plan_sha256``: the hash of the plan before it was prepared.
        """
        if plan.packed_adapter is None:
            return
        packed = self._state.packed
        try:
            staged = packed.stage(plan, plan_sha256)
            with self._state.writing:
                content = self._state.index.content(plan.digest)
                if content is not None and content.plan_sha256 == plan_sha256:
                    packed.publish(staged, plan.digest)
                else:  # deleted, or folded again
                    packed.discard(staged)
            worked("storage")
        except OSError as error:
            _log.error(
                "adapter %s is not kept in prepared form, its loads from disk take longer: %s",
                plan.digest[:12],
                error,
                extra={"part": "storage"},
            )

    def composite_bytes(self, composite: Composite, parts: Sequence[Content], digest: str) -> int:
        """Return the bytes of a composite before it is prepared. Takes milliseconds.

        Raises the errors of ``load_composite`` for ranks and for parts that do not combine.
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
        """Combine the unprepared plans of the parts: prepared forms are rounded."""
        built = composite.build([self.read(part) for part in parts], digest)
        with _as_unservable():
            return self.prepare(built)

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        """Check the plan, and pack it if the store has an engine. Raises AdapterRefused."""
        self._check_plan(plan)
        return plan if self._packer is None else self._packer.prepare(plan)

    def refusal(self, content: Content) -> str | None:
        """Return the reason why a stored content cannot be served; None if it can.

        Reads names and shapes only, in about a millisecond. Contents that are not on this disk are
        checked when they are fetched.
        """
        path = self._state.files.path(content.digest) / PLAN_FILE
        try:
            self._check_base(content)
            if self._local is None or path.exists():
                self._check_plan(peek_plan(path))
        except AdapterRefused as error:
            return str(error)
        except StoredAdapterDamaged as error:
            return None if self._local is not None else str(error)  # it will be fetched again
        return None

    def _check_plan(self, plan: AdapterPlan) -> None:
        if self._check is not None:
            self._check(plan)

    def read(self, content: Content, cancelled: threading.Event | None = None) -> AdapterPlan:
        """Read the plan as it was folded, with its factors in float32."""
        read = partial(read_plan, sha256=content.plan_sha256)
        return self._from_file(content, read, cancelled)

    def _from_file(
        self,
        content: Content,
        read: Callable[[Path], AdapterPlan],
        cancelled: threading.Event | None = None,
    ) -> AdapterPlan:
        self._check_base(content)
        path = self._state.files.path(content.digest) / PLAN_FILE
        if self._local is None:
            return read(path)
        self._local.ensure(content, cancelled)
        try:
            return read(path)
        except StoredAdapterDamaged:  # or evicted meanwhile, or folded differently
            self._local.fetch_again(content, cancelled)
            return read(path)

    def _check_base(self, content: Content) -> None:
        if content.base_fingerprint != self._state.base.fingerprint:
            raise BaseMismatch(
                f"adapter {content.digest[:12]} was checked against another base than "
                f"{self._state.base.model_id}; add it again"
            )


@contextmanager
def _as_unservable() -> Iterator[None]:
    """Turn AdapterRefused into UnservableAdapter: another server accepted the adapter."""
    try:
        yield
    except AdapterRefused as error:
        raise UnservableAdapter(str(error)) from error
