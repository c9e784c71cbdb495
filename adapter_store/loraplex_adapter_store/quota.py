"""How much a tenant may have. Counted where names change, in one step with the change."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import QuotaExceeded

__all__ = ["NO_QUOTA", "Quota"]


@dataclass(frozen=True, slots=True)
class Quota:
    """None: no limit."""

    max_adapters: int | None = None  # names
    max_bytes: int | None = None  # of files on disk, older revisions that are kept included
    max_pins: int | None = None  # pinned names

    def check_adapters(self, n: int) -> None:
        """``n``: names that there would be. Raises QuotaExceeded."""
        if self.max_adapters is not None and n > self.max_adapters:
            raise QuotaExceeded(
                f"max_adapters: this tenant may have {self.max_adapters} adapters and has them; "
                "delete one, or ask the operator for more"
            )

    def check_bytes(self, n: int) -> None:
        """``n``: bytes that there would be. Raises QuotaExceeded."""
        if self.max_bytes is not None and n > self.max_bytes:
            raise QuotaExceeded(
                f"max_bytes: this tenant's adapters would take {n:,} bytes, it may have "
                f"{self.max_bytes:,}; delete some, or ask the operator for more"
            )

    def check_pins(self, n: int) -> None:
        """``n``: pinned names that there would be. Raises QuotaExceeded."""
        if self.max_pins is not None and n > self.max_pins:
            raise QuotaExceeded(
                f"max_pins: this tenant may pin {self.max_pins} adapters and does; unpin one, or "
                "ask the operator for more"
            )


NO_QUOTA = Quota()
