"""Downloads of one tenant beside another tenant's calls. ``tests/cluster`` asks gateways."""

from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.attacks.downloads import MAX_BYTES, check_waits_beside_downloads, hostile_web
from tests.attacks.two_tenants import two_tenants
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bounds import broken_only_if_each_time
from tests.support.servers.server_process import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@broken_only_if_each_time
def test_slow_and_huge_downloads_of_one_tenant_hold_up_no_other(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    lora = write_lora(tmp_path / "lora", BaseSpec.of(tiny_model(), "model"))
    flags = ("--max-upload-size", str(MAX_BYTES))
    with (
        hostile_web(tmp_path) as web,
        two_tenants(tmp_path, model, "--allow-source", web.url, *flags, web_url=web.url) as both,
    ):
        both.small.put("warmed", lora)
        check_waits_beside_downloads(both.flood, both.small, web)
