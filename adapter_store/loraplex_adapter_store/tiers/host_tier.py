"""Keeps folded plans in host memory: a byte budget, leases, pins, and one load per digest."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from loraplex_adapter_store.errors import HostTierFull, LoadCancelled
from loraplex_adapter_store.plan import AdapterPlan

from .eviction import Policy, Resident, cost_aware, spare_bytes, touch, victims
from .use_limit import UseLimit

_MAX_LOAD_TIMES = 10_000  # digests whose last load time is kept
_CHECK_CANCELLED_S = 0.5  # how often a wait for memory checks for cancellation


@dataclass(slots=True)
class _Entry:
    future: Future[AdapterPlan]
    resident: Resident  # its bytes are reserved from the start of the load
    n_leases: int = 0

    @property
    def n_bytes(self) -> int:
        return self.resident.n_bytes


@dataclass(frozen=True, slots=True)
class HostTierStats:
    n_host_plans: int
    n_leases: int
    host_bytes_used: int
    host_bytes_total: int
    n_host_hits: int
    n_host_loads: int
    n_host_evictions: int
    load_seconds: float  # sum over all loads


@dataclass(slots=True)
class _Counters:
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    parked: dict[str, float] = field(default_factory=dict)  # digest → heat when it was evicted
    last_load_s: dict[str, float] = field(default_factory=dict)  # digest → oldest load first


class HostTier:
    """The plans in host memory. Thread-safe.

    ``lease`` runs ``load`` on the calling thread, once per digest at a time.
    """

    def __init__(self, n_bytes: int, wait_s: float, policy: Policy = cost_aware) -> None:
        """``wait_s``: how long a load waits for leased plans to leave."""
        self._n_bytes = n_bytes
        self._policy = policy
        self._wait_s = wait_s
        self._use_limit = UseLimit(n_bytes)
        self._entries: dict[str, _Entry] = {}
        self._holds: Counter[str] = Counter()
        self._pinned: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._clock = 0
        self._counters = _Counters()

    def lease(
        self,
        digest: str,
        n_bytes: int,
        load: Callable[[], AdapterPlan],
        *,
        tenant: str = "",
        user: str = "",
        cancelled: threading.Event | None = None,
    ) -> AdapterPlan:
        """Count a lease and return the plan, loading it if it is not resident.

        Raises the error of ``load``, or HostTierFull; then no lease is counted. The tier frees
        ``n_bytes``, the expected size, before the load. ``tenant``, the owner, takes from others
        only their excess over an equal share. ``user``, the tenant that requests the plan, waits
        at its ``UseLimit``. ``cancelled`` ends the wait for memory with LoadCancelled.
        """
        entry, is_mine = self._join(digest, n_bytes, tenant, user, cancelled)
        if is_mine:
            self._load(digest, entry, load)
        try:
            plan = entry.future.result()
            if is_mine:
                self._note_load(digest, entry.resident.load_cost)
            return plan
        except BaseException:
            self._leave(digest, entry, user)
            raise

    def keep(self, plan: AdapterPlan, n_bytes: int, *, tenant: str = "") -> None:
        """Add a plan that was just built, without a lease. Raises HostTierFull."""
        entry, is_mine = self._join(plan.digest, n_bytes, tenant)
        if is_mine:
            self._load(plan.digest, entry, lambda: plan)
        self.release(plan.digest)

    def lease_resident(self, digest: str, *, user: str = "") -> AdapterPlan | None:
        """Lease a resident plan. Returns None, without a lease, if ``lease`` might have to wait."""
        with self._changed:
            entry = self._entries.get(digest)
            if entry is None or not entry.future.done() or entry.future.exception() is not None:
                return None
            if not self._use_limit.allows(user, digest, entry.n_bytes):
                return None
            self._clock += 1
            self._count_hit(digest, entry, user)
            return entry.future.result()

    def release(self, digest: str, *, user: str = "") -> None:
        """End a lease of ``user``."""
        with self._changed:
            self._use_limit.end(user, digest)
            entry = self._entries.get(digest)
            if entry is not None:
                entry.n_leases -= 1
            self._changed.notify_all()

    def hold(self, digest: str) -> None:
        """Count a use of a content's files. Loads nothing."""
        with self._changed:
            self._holds[digest] += 1

    def let_go(self, digest: str) -> None:
        """End a ``hold``."""
        with self._changed:
            self._holds[digest] -= 1
            if self._holds[digest] <= 0:
                del self._holds[digest]
            self._changed.notify_all()

    def has_room(self, n_bytes: int) -> bool:
        with self._changed:
            return n_bytes <= self._n_bytes - self._used()

    def has(self, digest: str) -> bool:
        """True if the plan is loaded, loading or held."""
        with self._changed:
            return digest in self._entries or digest in self._holds

    def drop(self, digest: str) -> int:
        """Forget an unleased plan and return its bytes; 0 if it is absent or leased."""
        with self._changed:
            self._counters.parked.pop(digest, None)
            self._counters.last_load_s.pop(digest, None)
            entry = self._entries.get(digest)
            if entry is None or entry.n_leases > 0:
                return 0
            del self._entries[digest]
            self._changed.notify_all()
            return entry.n_bytes

    def unload(self, digest: str) -> int:
        """Evict an idle plan and return the number of uses that keep it. A pinned plan stays."""
        with self._changed:
            n_uses = self._n_uses(digest)
            if not n_uses and digest in self._entries and digest not in self._pinned:
                self._park(digest)
                self._changed.notify_all()
            return n_uses

    def pin(self, digests: frozenset[str]) -> None:
        """Replace the set of digests that are never evicted."""
        with self._changed:
            self._pinned = digests

    def n_leases(self, digest: str) -> int:
        with self._changed:
            return self._n_uses(digest)

    def bytes_of(self, digest: str) -> int:
        with self._changed:
            entry = self._entries.get(digest)
            return entry.n_bytes if entry is not None and entry.future.done() else 0

    def last_load_s(self, digest: str) -> float | None:
        """Return the seconds of the last load; None if the digest was never loaded here."""
        with self._changed:
            return self._counters.last_load_s.get(digest)

    def sizes(self) -> dict[str, int]:
        """Return digest → bytes of the resident plans, without those that are still loading."""
        with self._changed:
            return {d: entry.n_bytes for d, entry in self._entries.items() if entry.future.done()}

    def stats(self) -> HostTierStats:
        with self._changed:
            return HostTierStats(
                n_host_plans=len(self._entries),
                n_leases=sum(entry.n_leases for entry in self._entries.values()),
                host_bytes_used=self._used(),
                host_bytes_total=self._n_bytes,
                n_host_hits=self._counters.hits,
                n_host_loads=self._counters.loads,
                n_host_evictions=self._counters.evictions,
                load_seconds=self._counters.load_seconds,
            )

    def _join(
        self,
        digest: str,
        n_bytes: int,
        tenant: str,
        user: str = "",
        cancelled: threading.Event | None = None,
    ) -> tuple[_Entry, bool]:
        with self._changed:
            self._clock += 1
            entry = self._wait_for_room(digest, n_bytes, tenant, user, cancelled)
            if entry is not None:
                self._count_hit(digest, entry, user)
                return entry, False
            heat = self._counters.parked.pop(digest, 0.0) + 1.0
            resident = Resident(digest, n_bytes, 0.0, self._clock, heat, tenant)
            entry = _Entry(Future(), resident, n_leases=1)
            self._use_limit.begin(user, digest, n_bytes)
            self._entries[digest] = entry
            self._counters.loads += 1
            return entry, True

    def _count_hit(self, digest: str, entry: _Entry, user: str) -> None:
        self._counters.hits += 1
        entry.resident = touch(entry.resident, self._clock)
        entry.n_leases += 1
        self._use_limit.begin(user, digest, entry.n_bytes)

    def _wait_for_room(
        self,
        digest: str,
        n_bytes: int,
        tenant: str,
        user: str,
        cancelled: threading.Event | None,
    ) -> _Entry | None:
        """Wait until ``user`` may use the plan, and it is resident or ``n_bytes`` are free.

        Returns the entry if it is resident or another thread loads it. Raises HostTierFull.
        """
        deadline = time.monotonic() + self._wait_s
        while True:
            LoadCancelled.raise_if(cancelled)
            entry = self._entries.get(digest)
            is_allowed = self._use_limit.allows(user, digest, n_bytes)
            if is_allowed and (entry is not None or self._make_room(n_bytes, tenant)):
                return entry
            remaining_s = deadline - time.monotonic()
            never_fits = is_allowed and n_bytes > self._n_bytes - self._pinned_bytes()
            if never_fits or remaining_s <= 0:
                raise HostTierFull(self._fullness(digest, n_bytes, is_allowed=is_allowed))
            self._changed.wait(min(remaining_s, _CHECK_CANCELLED_S))

    def _make_room(self, n_bytes: int, tenant: str) -> bool:
        """Evict until ``n_bytes`` are free; return False if leases and pins keep too much."""
        missing = n_bytes - (self._n_bytes - self._used())
        if missing <= 0:
            return True
        chosen = self._victims(n_bytes, missing, tenant)
        if chosen is None:
            return False
        for key in chosen:
            self._park(key)
        self._counters.evictions += len(chosen)
        return True

    def _fullness(self, digest: str, n_bytes: int, *, is_allowed: bool) -> str:
        start = f"adapter {digest[:12]} needs {n_bytes} bytes of host memory"
        if not is_allowed:
            return (
                f"{start}, and the adapters that this tenant's requests use have the most that one "
                "tenant may use at once; send fewer requests for different adapters at once, or "
                "raise the host budget"
            )
        return (
            f"{start}, {self._n_bytes - self._used()} of {self._n_bytes} are free and the rest is "
            "leased or pinned; raise the host budget or unpin adapters"
        )

    def _load(self, digest: str, entry: _Entry, load: Callable[[], AdapterPlan]) -> None:
        started = time.monotonic()
        try:
            plan = load()
        except BaseException as error:
            with self._changed:
                self._entries.pop(digest, None)
                self._changed.notify_all()
            entry.future.set_exception(error)
            return
        seconds = time.monotonic() - started
        with self._changed:
            entry.resident = replace(entry.resident, n_bytes=plan.n_bytes, load_cost=seconds)
            self._counters.load_seconds += seconds
            self._changed.notify_all()
        entry.future.set_result(plan)

    def _leave(self, digest: str, entry: _Entry, user: str) -> None:
        """Return the lease of a failed load. The entry may have been removed or replaced."""
        with self._changed:
            self._use_limit.end(user, digest)
            if self._entries.get(digest) is entry:
                entry.n_leases -= 1
            self._changed.notify_all()

    def _note_load(self, digest: str, seconds: float) -> None:
        with self._changed:
            times = self._counters.last_load_s
            times.pop(digest, None)
            times[digest] = seconds
            if len(times) > _MAX_LOAD_TIMES:
                del times[next(iter(times))]

    def _victims(self, n_bytes: int, missing: int, tenant: str) -> tuple[str, ...] | None:
        used: Counter[str] = Counter()
        for entry in self._entries.values():
            used[entry.resident.tenant] += entry.n_bytes
        spare = None
        if n_bytes <= self._n_bytes / len({*used, tenant}):  # a larger plan takes from all
            spare = spare_bytes(used, self._n_bytes, tenant)
        return victims(self._evictable(), missing, self._clock, self._policy, spare)

    def _pinned_bytes(self) -> int:
        return sum(e.n_bytes for digest, e in self._entries.items() if digest in self._pinned)

    def _evictable(self) -> list[Resident]:
        return [
            entry.resident
            for digest, entry in self._entries.items()
            if entry.n_leases == 0 and digest not in self._pinned
        ]

    def _park(self, digest: str) -> None:
        """Forget the plan, but keep its use count."""
        self._counters.parked[digest] = self._entries.pop(digest).resident.heat

    def _n_uses(self, digest: str) -> int:
        entry = self._entries.get(digest)
        return self._holds[digest] + (0 if entry is None else entry.n_leases)

    def _used(self) -> int:
        return sum(entry.n_bytes for entry in self._entries.values())
