"""Downloads that a gateway makes for one tenant, beside another tenant's calls."""

from pathlib import Path

import pytest

from tests.attacks.downloads import HostileWeb, check_waits_beside_downloads
from tests.attacks.two_tenants import tenant_of
from tests.support.bounds import broken_only_if_each_time
from tests.support.servers.cluster_process import ClusterProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


@broken_only_if_each_time
def test_slow_and_huge_downloads_of_one_tenant_hold_up_no_other(
    cluster: ClusterProcess, world: Path, web: HostileWeb
) -> None:
    with tenant_of(cluster.url, "flood") as flood, tenant_of(cluster.url, "small") as small:
        small.put("warmed", world / "web" / "lora")
        check_waits_beside_downloads(flood, small, web)
