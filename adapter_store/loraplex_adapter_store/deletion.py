"""A deleted name. The bytes are freed when the last request that uses them ends."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from .card import DeleteReport, TierBytes

__all__ = ["Deletion"]


@dataclass(frozen=True, slots=True)
class Deletion:
    name: str
    digest: str
    n_leases: int  # when the name was removed
    # done when no request uses the content any more; at once if other names keep it
    freed: Future[TierBytes] = field(default_factory=Future)

    def report(self, freed: TierBytes | None) -> DeleteReport:
        """``freed``: the result, or None if it was not waited for until the end."""
        n_bytes = freed or TierBytes(0, 0)
        return DeleteReport(self.name, self.digest, freed is not None, self.n_leases, n_bytes)
