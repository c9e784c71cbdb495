"""The options of a put, and the limits of a tenant, which each change of a name checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex_adapter_store.errors import QuotaExceeded
from loraplex_adapter_store.report import JsonValue


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of one tenant. None: no limit."""

    max_adapters: int | None = None  # names
    max_bytes: int | None = None  # on disk: adapters with kept revisions, and what else is counted
    max_pins: int | None = None  # pinned names

    def check_adapters(self, n: int) -> None:
        """Raises QuotaExceeded if the tenant may not have ``n`` names."""
        if self.max_adapters is not None and n > self.max_adapters:
            raise QuotaExceeded(
                f"max_adapters: this tenant may have {self.max_adapters} adapters and has them; "
                "delete one, or ask the operator for more"
            )

    def check_bytes(self, n: int) -> None:
        """Raises QuotaExceeded if the tenant may not have ``n`` bytes."""
        if self.max_bytes is not None and n > self.max_bytes:
            raise QuotaExceeded(
                f"max_bytes: this tenant would store {n:,} bytes, it may store "
                f"{self.max_bytes:,}; delete adapters or files, or ask the operator for more"
            )

    def check_pins(self, n: int) -> None:
        """Raises QuotaExceeded if the tenant may not pin ``n`` names."""
        if self.max_pins is not None and n > self.max_pins:
            raise QuotaExceeded(
                f"max_pins: this tenant may pin {self.max_pins} adapters and does; unpin one, or "
                "ask the operator for more"
            )


NO_QUOTA = Quota()


@dataclass(frozen=True, slots=True)
class PutOptions:
    if_match: str | None = None  # the digest or ETag that the name must have
    replace: bool = True  # False: the name must not exist
    description: str | None = None
    examples: Sequence[str] = ()  # prompts
    provenance: Mapping[str, JsonValue] | None = None  # None: from the kind of put
    expires: float | None = None  # seconds since the epoch, see ``AdapterStore.expire``
    defaults: Mapping[str, JsonValue] | None = None  # for requests
    quota: Quota = NO_QUOTA  # of the name's tenant
    n_kept: int | None = None  # older contents to keep; None: as the store does
