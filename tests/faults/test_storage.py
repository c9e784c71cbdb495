"""A disk that fails at any operation: uploads, sources and generated adapters over HTTP."""

import errno
from itertools import count
from pathlib import Path

import pytest

from loraplex_adapter_store.contents.content_files import Disk
from tests.faults.conftest import World, check_fault
from tests.faults.test_catalogue import Act, _delete, _generate, _put_new, _replace, _source_job
from tests.faults.test_catalogue import _source as source
from tests.support.kth_fault import KthFault

pytestmark = pytest.mark.anyio


class FailingDisk(Disk):
    def __init__(self, fault: KthFault) -> None:
        self._fault = fault

    def before(self, operation: str, path: Path) -> None:
        self._fault.pass_through()


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "/home/secret/contents")


@pytest.mark.parametrize(
    "act",
    [
        _put_new,
        _delete,
        *(
            pytest.param(act, marks=pytest.mark.nightly)
            for act in (_replace, _generate, _source_job)
        ),
    ],
)
async def test_any_failed_file_operation_fails_its_request_alone(
    act: Act, world: World, samples: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(world, 50)
    fault = KthFault(_no_space)
    disk = FailingDisk(fault)
    monkeypatch.setattr(world.store.state.files, "_disk", disk)
    monkeypatch.setattr(world.store.state.packed, "_disk", disk)
    n_counted = world.health_tracker.counts["storage"]
    async with world.canary():
        for k in count():
            await world.upload("oft", samples["OFT"])
            before = await world.listing()
            fault.arm(k)
            answer = await act(world, k)
            world.store.garbage.finish()
            if not fault.disarm():
                break
            assert world.health_tracker.counts["storage"] > n_counted
            n_counted = world.health_tracker.counts["storage"]
            if answer.is_success:  # a cache, or files that nobody needs any more
                continue
            check_fault(answer, "storage_unavailable")
            assert await world.listing() == before
            assert (await world.health())["degraded"][0]["problem"] == "No space left on device"
            assert (await act(world, k)).is_success
    assert answer.is_success, answer.text
    await world.check_idle()


async def test_an_upload_that_cannot_be_written_is_a_503(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that uploads are written to is gone; the next one finds it again."""
    staging = world.store.state.files._staging
    staging.rename(staging.with_name("away"))
    staging.write_text("a file where a folder belongs")
    check_fault(await _put_new(world, 1), "storage_unavailable")
    staging.unlink()
    staging.with_name("away").rename(staging)
    assert (await _put_new(world, 1)).is_success
    assert (await world.health())["status"] == "ok"
