"""The bytes that a tenant's requests may use at once."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import HostTierFull
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.tiers.use_limit import UseLimit
from tests.adapter_store.conftest import MakeAdapter, OpenStore
from tests.adapter_store.test_store import plan_bytes

TOTAL, SIZE = 1000, 20
STEPS = st.lists(
    st.tuples(st.sampled_from(["acme", "bravo", "carol"]), st.integers(0, 59), st.booleans()),
    max_size=300,
)


def flood(limit: UseLimit, tenant: str, first: int) -> int:
    """Use plans until no more is allowed. Return how many it were."""
    n = 0
    while limit.allows(tenant, f"{first + n}", SIZE):
        limit.begin(tenant, f"{first + n}", SIZE)
        n += 1
    return n


def test_tenants_that_use_all_they_may_leave_plans_for_the_next() -> None:
    limit = UseLimit(TOTAL)
    assert flood(limit, "acme", 0) == 40  # 4/5 of 50 plans
    assert flood(limit, "bravo", 100) == 8  # four times the two that are left
    assert limit.allows("carol", "200", SIZE)
    for n in range(40):
        limit.end("acme", f"{n}")
    assert flood(limit, "carol", 200) == 33  # of the 42 that bravo leaves


def test_a_first_plan_and_the_operators_have_no_limit() -> None:
    limit = UseLimit(TOTAL)
    assert limit.allows("acme", "large", 990)
    limit.begin("acme", "large", 990)
    assert limit.allows("acme", "large", 990)  # again
    assert not limit.allows("acme", "other", 1)
    assert limit.allows("", "other", 10)


@given(STEPS)
def test_what_ended_counts_no_more(steps: list[tuple[str, int, bool]]) -> None:
    """However uses of shared plans begin and end, the limit is that of the uses that are left."""
    limit, uses = UseLimit(TOTAL), Counter[tuple[str, str]]()
    for tenant, number, begins in steps:
        digest = f"{number}"
        if begins:
            limit.begin(tenant, digest, SIZE)
            uses[tenant, digest] += 1
        elif uses[tenant, digest]:
            limit.end(tenant, digest)
            uses[tenant, digest] -= 1
    left = +uses
    mine = len({digest for tenant, digest in left if tenant == "acme"})
    n_used = len({digest for _, digest in left})
    expected = not mine or SIZE * (mine + 1) <= 4 * (TOTAL - SIZE * (n_used + 1))
    assert limit.allows("acme", "new", SIZE) == expected


def test_an_adapter_in_memory_waits_too_if_its_user_has_the_most_in_use(
    tmp_path: Path, base: BaseSpec, make_adapter: MakeAdapter, opened: OpenStore
) -> None:
    limits = StoreLimits(host_wait_s=0.05)
    with opened(tmp_path / "s", base, host_bytes=5 * plan_bytes(), limits=limits) as store:
        names = [f"a{n}" for n in range(5)]
        for seed, name in enumerate(names, start=1):
            store.put_directory(name, make_adapter(seed))
            store.acquire(name).release()
        held = [store.acquire(name, tenant="acme") for name in names[:4]]
        last = names[4]
        with pytest.raises(HostTierFull, match="one tenant may use at once"):
            store.acquire(last, tenant="acme")
        for other in ("bravo", ""):
            store.acquire(last, tenant=other).release()
        held.pop().release()
        with store.acquire(last, tenant="acme"):
            pass
        for lease in held:
            lease.release()
        assert store.stats().n_leases == 0
