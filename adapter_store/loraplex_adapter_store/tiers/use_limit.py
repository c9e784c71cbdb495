"""Bounds the memory of the plans that a tenant uses at once. Plans in use cannot be evicted."""

from collections import Counter

_FACTOR = 4


class UseLimit:
    """The bytes of the plans in use, by tenant. Its owner's lock guards it.

    A tenant may use four times the bytes that nobody uses: one tenant 4/5 of the memory, each of
    two 4/9, each of three 4/13. So the next tenant finds plans that can be evicted, however many
    the others use. Dynamic thresholds: Choudhury and Hahne, IEEE/ACM ToN 6 (2), 1998.
    """

    def __init__(self, n_bytes: int) -> None:
        """``n_bytes``: size of the memory."""
        self._n_bytes = n_bytes
        self._n_used = 0  # bytes of all plans in use
        self._sizes: dict[str, int] = {}  # digest → bytes when its use began
        self._uses: dict[str, Counter[str]] = {}  # digest → tenant → number of uses
        self._used: Counter[str] = Counter()  # bytes by tenant; a shared plan counts for each

    def allows(self, tenant: str, digest: str, n_bytes: int) -> bool:
        """True if the tenant may use a plan of ``n_bytes``. Its first plan is always allowed.

        The operator, "", has no limit.
        """
        if not tenant or not self._used[tenant]:
            return True
        if digest in self._uses and self._uses[digest][tenant]:
            return True
        n_unused = self._n_bytes - self._n_used
        if digest not in self._sizes:
            n_unused -= n_bytes
        return self._used[tenant] + n_bytes <= _FACTOR * n_unused

    def begin(self, tenant: str, digest: str, n_bytes: int) -> None:
        """Count a use, until ``end``."""
        if digest not in self._sizes:
            self._sizes[digest], self._uses[digest] = n_bytes, Counter()
            self._n_used += n_bytes
        uses = self._uses[digest]
        if not uses[tenant]:
            self._used[tenant] += self._sizes[digest]
        uses[tenant] += 1

    def end(self, tenant: str, digest: str) -> None:
        uses = self._uses[digest]
        uses[tenant] -= 1
        if uses[tenant]:
            return
        del uses[tenant]
        self._used[tenant] -= self._sizes[digest]
        if not self._used[tenant]:
            del self._used[tenant]
        if not uses:
            del self._uses[digest]
            self._n_used -= self._sizes.pop(digest)
