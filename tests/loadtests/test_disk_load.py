"""The benchmarks whose numbers the documentation gives still run."""

from pathlib import Path

from loadtests.parts.bench_disk_load import measure
from tests.support.servers.server_process import save_tiny_model


def test_a_load_from_disk_is_timed_with_its_packed_file_and_without(tmp_path: Path) -> None:
    found = measure(save_tiny_model(tmp_path / "model"), n_adapters=2, n_rounds=1)
    assert set(found) == {"kept_file_ms", "plan_read_and_packed_ms"}
    assert min(found.values()) > 0
