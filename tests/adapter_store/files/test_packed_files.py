"""Prepared plans on disk: as good as new, never trusted, never in the way."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.contents.content_files import PLAN_FILE, Disk
from loraplex_adapter_store.errors import StoredAdapterDamaged
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.conftest import plain_lora
from tests.adapter_store.test_store import put
from tests.support.adapters.packers import TensorForm, TensorsAside
from tests.support.bases.tiny_models import tiny_llama


def form_seed(plan: AdapterPlan) -> float:
    """``seed_of`` for a prepared plan."""
    values = {float(v) for tensor in form_of(plan) for v in tensor.unique()}
    assert len(values) == 1, f"contents mixed up: {values}"
    return values.pop()


def form_file(root: Path, digest: str) -> Path:
    return root / "packed" / digest[:2] / digest


def loaded(root: Path, base: BaseSpec, packer: TensorsAside, name: str = "x") -> AdapterPlan:
    """Load the plan from disk in a new store, and let its clean-up finish."""
    with (
        AdapterStore(root, base, engine=EngineHooks(packer)) as store,
        store.acquire(name) as lease,
    ):
        return lease.plan


def test_a_load_from_disk_prepares_nothing(tmp_path: Path, base: BaseSpec) -> None:
    first, second = TensorsAside(), TensorsAside()
    with AdapterStore(tmp_path, base, engine=EngineHooks(first)) as store:
        put(store, "x", 1)
        with store.acquire("x") as lease:
            known = lease.plan
    plan = loaded(tmp_path, base, second)
    assert (first.n_prepared, second.n_prepared) == (1, 0)
    assert form_seed(plan) == 1
    assert (plan.digest, plan.n_bytes, plan.family) == (known.digest, known.n_bytes, known.family)


def test_it_needs_no_more_than_its_own_file(tmp_path: Path, base: BaseSpec) -> None:
    with AdapterStore(tmp_path, base, engine=EngineHooks(TensorsAside())) as store:
        digest = put(store, "x", 1)
    (tmp_path / "contents" / digest[:2] / digest / PLAN_FILE).unlink()
    assert form_seed(loaded(tmp_path, base, TensorsAside())) == 1
    form_file(tmp_path, digest).unlink()
    with pytest.raises(StoredAdapterDamaged):
        loaded(tmp_path, base, TensorsAside())


def test_an_adapter_that_was_added_without_a_preparer_is_prepared_once(
    tmp_path: Path, base: BaseSpec
) -> None:
    with AdapterStore(tmp_path, base) as store:
        digest = put(store, "x", 1)
    assert not form_file(tmp_path, digest).exists()
    packers = [TensorsAside() for _ in range(3)]
    plans = [loaded(tmp_path, base, packer) for packer in packers]
    assert [packer.n_prepared for packer in packers] == [1, 0, 0]
    assert [form_seed(plan) for plan in plans] == [1, 1, 1]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_made_anew(
    damage: str, share: float, tmp_path: Path, base: BaseSpec
) -> None:
    with AdapterStore(tmp_path, base, engine=EngineHooks(TensorsAside())) as store:
        digest = put(store, "x", 1)
    file = form_file(tmp_path, digest)
    whole = file.read_bytes()
    place = min(int(share * len(whole)), len(whole) - 1)
    if damage == "flip":
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    else:
        file.write_bytes(whole[:place])
    packer = TensorsAside()
    assert form_seed(loaded(tmp_path, base, packer)) == 1
    assert packer.n_prepared == 1
    assert file.read_bytes() == whole


def test_another_preparer_makes_its_own(tmp_path: Path, base: BaseSpec) -> None:
    with AdapterStore(tmp_path, base, engine=EngineHooks(TensorsAside("old"))) as store:
        put(store, "x", 1)
    for key, n_prepared in (("new", 1), ("new", 0), ("old", 1)):
        packer = TensorsAside(key)
        assert form_seed(loaded(tmp_path, base, packer)) == 1
        assert packer.n_prepared == n_prepared, key


class NoRoomForForms(Disk):
    def write(self, path: Path, chunks: object, *, flush: bool = True) -> int:
        if not flush:
            super().write(path, [b"torn"], flush=False)
            raise OSError("No space left on device")
        return super().write(path, chunks, flush=flush)  # type: ignore[arg-type]


@pytest.mark.parametrize("missed", ["no packer", "no room"])
def test_a_form_of_another_base_is_made_anew(missed: str, tmp_path: Path, base: BaseSpec) -> None:
    other = BaseSpec.of(tiny_llama(seed=1), "tiny-llama")
    with AdapterStore(tmp_path, base, engine=EngineHooks(TensorsAside())) as store:
        put_dora(store, "x")
    packer = None if missed == "no packer" else TensorsAside()
    with AdapterStore(tmp_path, other, engine=EngineHooks(packer), disk=NoRoomForForms()) as store:
        put_dora(store, "x")
    packers = [TensorsAside(), TensorsAside()]
    plans = [loaded(tmp_path, other, packer) for packer in packers]
    assert [packer.n_prepared for packer in packers] == [1, 0]
    with AdapterStore(tmp_path / "fresh", other, engine=EngineHooks(TensorsAside())) as store:
        put_dora(store, "x")
        with store.acquire("x") as lease:
            for plan in plans:
                assert all(map(torch.equal, form_of(plan), form_of(lease.plan)))


def put_dora(store: AdapterStore, name: str) -> None:
    """Its scales come from the base's weights."""
    config, tensors = plain_lora(1)
    for key in [key for key in tensors if "lora_A" in key]:
        tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(32)
    store.put_tensors(name, {**config, "use_dora": True}, tensors)


def form_of(plan: AdapterPlan) -> tuple[Tensor, ...]:
    assert isinstance(plan.packed_adapter, TensorForm)
    return plan.packed_adapter.tensors


def test_it_goes_with_the_adapter_and_is_counted(tmp_path: Path, base: BaseSpec) -> None:
    with AdapterStore(tmp_path, base, engine=EngineHooks(TensorsAside())) as store:
        digest = put(store, "x", 1)
        size = form_file(tmp_path, digest).stat().st_size
        contents = sum(f.stat().st_size for f in (tmp_path / "contents").glob("*/*/*"))
        assert store.delete("x").n_bytes_freed.disk == contents + size
        assert not form_file(tmp_path, digest).exists()


def test_what_belongs_to_no_adapter_is_swept(tmp_path: Path, base: BaseSpec) -> None:
    with AdapterStore(tmp_path, base, engine=EngineHooks(TensorsAside())) as store:
        kept = put(store, "x", 1)
    orphan = form_file(tmp_path, "0" * 64)
    orphan.parent.mkdir()
    orphan.write_bytes(b"left by a crash")
    with AdapterStore(tmp_path, base):  # without a packer, too
        assert not orphan.exists()
        assert form_file(tmp_path, kept).exists()


def test_a_disk_without_room_for_it_does_not_keep_the_adapter_from_serving(
    tmp_path: Path, base: BaseSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        AdapterStore(
            tmp_path, base, disk=NoRoomForForms(), engine=EngineHooks(TensorsAside())
        ) as store,
    ):
        digest = put(store, "x", 1)
        with store.acquire("x") as lease:
            assert form_seed(lease.plan) == 1
    assert not any((tmp_path / "staging").iterdir())
    assert f"adapter {digest[:12]} is not kept in prepared form" in caplog.text


def test_a_plan_that_cannot_be_prepared_is_kept_as_it_is(tmp_path: Path, base: BaseSpec) -> None:
    class Refuses(TensorsAside):
        def prepare(self, plan: AdapterPlan) -> AdapterPlan:
            return plan

    plan = None
    with AdapterStore(tmp_path, base, engine=EngineHooks(Refuses())) as store:
        digest = put(store, "x", 1)
        with store.acquire("x") as lease:
            plan = lease.plan
    assert plan.packed_adapter is None
    assert not form_file(tmp_path, digest).exists()


def test_tensors_of_any_dtype_and_shape_come_back_bit_by_bit(
    tmp_path: Path, base: BaseSpec
) -> None:
    numbers = torch.arange(7, dtype=torch.float32).log()
    tensors: list[Tensor] = [
        numbers.to(torch.bfloat16),
        numbers.half().view(7, 1),
        torch.empty(0),
        torch.tensor([[-1, 1 << 40]]),
        numbers.double(),
    ]

    class AsTheyAre(TensorForm):
        def dump(self) -> tuple[int, list[Tensor]]:
            return len(tensors), tensors

    class Various(TensorsAside):
        def prepare(self, plan: AdapterPlan) -> AdapterPlan:
            return replace(plan, modules={}, packed_adapter=AsTheyAre(tuple(tensors)))

    with AdapterStore(tmp_path, base, engine=EngineHooks(Various())) as store:
        put(store, "x", 1)
    found = loaded(tmp_path, base, Various())
    for got, wanted in zip(form_of(found), tensors, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got, wanted)
