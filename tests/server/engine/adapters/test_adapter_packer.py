"""The form of adapters in host memory: smaller, cut loose from their files, the same text."""

import asyncio
import gc
import hashlib
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.contents.content_files import Disk
from loraplex_adapter_store.contents.packed_files import PackedFiles
from loraplex_adapter_store.errors import LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.names.selector import parse_selector
from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan, SharedBasis
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_server.engine.adapters.adapter_packer import _FORMAT, PackedAdapter
from tests.support.adapters.lora_files import write_lora
from tests.support.adapters.plan_executor import plan_logits
from tests.support.adapters.routed_plans import lora_plan, mixlora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.servers.engines import PlanLease, generate_all, running_engine


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def test_a_prepared_plan_keeps_no_factor_and_no_memory_of_the_plan(model: PreTrainedModel) -> None:
    plan = mixlora_plan(model, n_experts=4, top_k=2, rank=8, seed=1)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in plan.tensors()}
    with running_engine(model) as engine:
        prepared = engine.packer.prepare(plan)
    packed = prepared.packed_adapter
    assert isinstance(packed, PackedAdapter)
    assert len(packed.factors) == 5
    assert packed.rank == 8
    assert all(module.a is None and module.b is None for module in prepared.modules.values())
    assert prepared.modules.keys() == plan.modules.keys()
    kept = {tensor.untyped_storage().data_ptr() for tensor in prepared.tensors()}
    assert not kept & theirs
    true_bytes = sum(tensor.nbytes for tensor in plan.tensors())
    assert true_bytes <= prepared.n_bytes <= 1.1 * true_bytes


def test_in_bfloat16_it_takes_half_the_bytes(model: PreTrainedModel) -> None:
    plan = lora_plan(model, rank=16, seed=2)
    with running_engine(model.to(torch.bfloat16)) as engine:
        prepared = engine.packer.prepare(plan)
    true_bytes = sum(tensor.nbytes for tensor in plan.tensors())
    assert prepared.n_bytes <= 0.55 * true_bytes
    model.float()


def test_a_basis_shared_by_modules_stays_one(model: PreTrainedModel) -> None:
    plan = _plan_of("shared", model)
    with running_engine(model) as engine:
        prepared = engine.packer.prepare(plan)
    bases = [part.shared.a.data_ptr() for part in prepared.modules.values() if part.shared]
    assert len(bases) == len(plan.modules) > 1
    assert len(set(bases)) == 1
    assert prepared.n_bytes <= 2 * 4 * 64 * 4 + 4 * 4 * len(plan.modules)


def test_a_plan_that_cannot_be_served_is_refused(model: PreTrainedModel) -> None:
    plan = lora_plan(model, rank=2, seed=3)
    stray = replace(plan, modules={f"{name}.x": part for name, part in plan.modules.items()})
    with running_engine(model) as engine, pytest.raises(UnsupportedAdapter, match=r"q_proj\.x"):
        engine.packer.prepare(stray)


def test_a_plan_that_the_device_pool_can_never_hold_is_refused_with_the_option(
    model: PreTrainedModel,
) -> None:
    with (
        running_engine(model, adapter_memory_bytes=4096) as engine,
        pytest.raises(LimitExceeded, match="--adapter-memory"),
    ):
        engine.packer.prepare(lora_plan(model, rank=64, seed=3))
    with (
        running_engine(model, max_loras=2) as engine,
        pytest.raises(LimitExceeded, match=r"3 slots.*--max-loras"),
    ):
        engine.packer.prepare(mixlora_plan(model, n_experts=2, top_k=1, rank=2, seed=3))


def test_names_and_mixtures_of_a_store_answer_as_their_full_plans_do(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    spec = BaseSpec.of(model, "tiny")
    prompt = [5, 9, 200, 31, 7]
    with running_engine(model) as engine:
        with AdapterStore(tmp_path / "full", spec, allowed_roots=[tmp_path]) as full:
            wanted = _plans(full, spec, tmp_path)
        with AdapterStore(
            tmp_path / "packed",
            spec,
            allowed_roots=[tmp_path],
            engine=EngineHooks(engine.packer),
        ) as packed:
            plans = _plans(packed, spec, tmp_path)
            used = packed.stats().host_bytes_used
        assert all(isinstance(plan.packed_adapter, PackedAdapter) for plan in plans)
        assert used == sum(plan.n_bytes for plan in plans)
        answers = generate_all(engine, [prompt] * len(plans), plans=plans)
    for plan, answer in zip(wanted, answers, strict=True):
        ids = list(prompt)
        for token in answer.token_ids:
            logits = plan_logits(model, plan, torch.tensor([ids]))
            assert token == int(logits[0, -1].argmax())
            ids.append(token)
    assert len({tuple(answer.token_ids) for answer in answers}) == len(plans)


def _plans(store: AdapterStore, spec: BaseSpec, folder: Path) -> list[AdapterPlan]:
    for seed, name in enumerate(("one", "two")):
        store.put_directory(name, write_lora(folder / name, spec, seed=seed))
    plans = []
    half = [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.5}]
    for wanted in ("one", "two", half):
        with store.acquire(parse_selector(wanted)) as lease:
            plans.append(lease.plan)
    return plans


def test_a_warmed_adapter_is_on_the_device_before_anybody_asks(model: PreTrainedModel) -> None:
    with running_engine(model) as engine:
        engine.warm(PlanLease(engine.packer.prepare(lora_plan(model, rank=4, seed=4))))
        while engine.stats().n_adapter_loads == 0:  # published by the loader's wake-up alone
            assert engine.alive
        assert engine.stats().pool_bytes_used > 0


def test_an_adapter_on_the_device_does_not_hold_its_form_in_host_memory(
    model: PreTrainedModel,
) -> None:
    with running_engine(model) as engine:
        prepared = engine.packer.prepare(lora_plan(model, rank=4, seed=5))
        assert isinstance(prepared.packed_adapter, PackedAdapter)
        image = weakref.ref(prepared.packed_adapter.factors[0].image)
        generate_all(engine, [[1, 2, 3]], plans=[prepared])
        assert engine.stats().n_adapter_loads == 1
        asyncio.run(engine.unload("nothing"))  # answered after the step of the last token
        del prepared
        gc.collect()
        assert image() is None


@pytest.mark.parametrize("kind", ["lora", "mixlora", "shared"])
def test_a_form_from_disk_is_the_form_that_was_made(
    kind: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    plan = _plan_of(kind, model)
    with running_engine(model) as engine:
        packer = engine.packer
        made = packer.prepare(plan)
        files = PackedFiles(tmp_path, Disk(), packer)
        (tmp_path / "staging").mkdir()
        content = Content(plan.digest, plan.family, (), 0, made.n_bytes, "base", "plan")
        files.publish(files.stage(made, content.plan_sha256), content.digest)
        found = files.read(content)
        assert found is not None
        assert replace(found, packed_adapter=None).modules.keys() == made.modules.keys()
        assert found.n_bytes == made.n_bytes
        for one, other in zip(found.tensors(), made.tensors(), strict=True):
            assert torch.equal(one, other)
        packed, wanted_packed = found.packed_adapter, made.packed_adapter
        assert isinstance(packed, PackedAdapter)
        assert isinstance(wanted_packed, PackedAdapter)
        for entry, wanted in zip(packed.factors, wanted_packed.factors, strict=True):
            assert torch.equal(entry.image, wanted.image)
            for part in ("starts", "lengths", "keys", "ranks"):
                assert np.array_equal(getattr(entry, part), getattr(wanted, part)), part
        prompt = [5, 9, 200, 31, 7]
        one, other = (
            generate_all(engine, [prompt], plans=[replace(p, digest=64 * mark)])[0].token_ids
            for p, mark in ((found, "a"), (made, "b"))
        )
        assert one == other
        storage = StorageWeakRef(packed.factors[0].image.untyped_storage())
        assert not storage.expired()
        del found, packed, entry
        gc.collect()
        assert storage.expired(), "what is on the device holds the file that it came from"


def _plan_of(kind: str, model: PreTrainedModel) -> AdapterPlan:
    if kind == "lora":
        return lora_plan(model, rank=20, seed=6)
    if kind == "mixlora":
        return mixlora_plan(model, n_experts=3, top_k=2, rank=4, seed=7)
    basis = (torch.randn(4, 64), torch.randn(64, 4))
    names = [name for name in BaseSpec.of(model, "tiny").modules if name.endswith("q_proj")]
    shared = SharedBasis("basis", *basis, rank_scale=torch.ones(4, 1))
    return AdapterPlan("d" * 64, Family.VERA, {name: ModulePlan(shared=shared) for name in names})


def test_packing_is_what_its_format_says(model: PreTrainedModel) -> None:
    """Where this fails the layout has changed: count _FORMAT up, and write the new digest here."""
    q = "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(q)
    assert isinstance(linear, torch.nn.Linear)
    n_out, n_in = linear.weight.shape
    numbers = torch.arange(20 * (n_in + n_out), dtype=torch.float32)
    a, b = numbers[: 20 * n_in].view(20, n_in), numbers[20 * n_in :].view(n_out, 20)
    module = ModulePlan(a=a, b=b, out_scale=b[:, 0].contiguous(), bias=b[:, 1].contiguous())
    with running_engine(model) as engine:
        prepared = engine.packer.prepare(AdapterPlan("e" * 64, Family.DORA, {q: module}))
        rank, tensors = prepared.packed_adapter.dump()
    digest = hashlib.sha256(repr(rank).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    assert (_FORMAT, digest.hexdigest()[:16]) == (8, "825db9656afa1ee6")
