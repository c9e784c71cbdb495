"""The adapter store: names, contents, leases. Synchronous and thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from .base_spec import BaseSpec
from .card import AdapterCard, DeleteReport, StoreStats
from .limits import StoreLimits
from .plan import AdapterPlan
from .report import JsonValue
from .selector import Selector

__all__ = ["AdapterLease", "AdapterStore"]


class AdapterLease:
    """The right to use one content while a request runs. Release exactly once, or use ``with``."""

    name: str
    digest: str
    revision: int
    plan: AdapterPlan

    def release(self) -> None: ...

    def __enter__(self) -> AdapterLease: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class AdapterStore:
    def __init__(
        self,
        root: Path,
        base: BaseSpec,
        *,
        limits: StoreLimits = StoreLimits(),  # noqa: B008  frozen value
        host_bytes: int = 2 << 30,
        allowed_roots: Sequence[Path] = (),
    ) -> None: ...

    def put_directory(
        self,
        name: str,
        path: Path,
        *,
        if_match: str | None = None,  # digest the name must have now
        replace: bool = True,  # False: the name must not exist
        description: str | None = None,
        examples: Sequence[str] = (),
    ) -> AdapterCard: ...

    def put_files(
        self,
        name: str,
        config: bytes,
        weights: bytes | Path,
        *,
        chat_template: str | None = None,
        if_match: str | None = None,
        replace: bool = True,
        description: str | None = None,
        examples: Sequence[str] = (),
        provenance: Mapping[str, JsonValue] | None = None,
    ) -> AdapterCard: ...

    def put_tensors(
        self,
        name: str,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        *,
        if_match: str | None = None,
        replace: bool = True,
        description: str | None = None,
        examples: Sequence[str] = (),
        provenance: Mapping[str, JsonValue] | None = None,
    ) -> AdapterCard:
        """For generated adapters: PEFT-style config and tensors in memory."""

    def put_source(
        self,
        name: str,
        uri: str,  # directory, file://, hf://org/repo[/sub][@rev], s3://, gs://, az://, https://
        *,
        if_match: str | None = None,
        replace: bool = True,
        description: str | None = None,
        examples: Sequence[str] = (),
        progress: Callable[[str, float], None] | None = None,  # stage, share done
    ) -> AdapterCard: ...

    def delete(self, name: str, *, timeout_s: float = 30.0) -> DeleteReport: ...

    def get(self, name: str) -> AdapterCard: ...

    def list(self) -> tuple[AdapterCard, ...]: ...

    def acquire(self, selector: Selector | str) -> AdapterLease: ...

    def pin(self, name: str) -> AdapterCard: ...

    def unpin(self, name: str) -> AdapterCard: ...

    def warm(self, name: str) -> AdapterCard: ...

    def stats(self) -> StoreStats: ...

    def on_retired(self, listener: Callable[[str], None]) -> None:
        """``listener(digest)`` runs when no name and no lease reaches a digest any more."""

    def close(self) -> None: ...
