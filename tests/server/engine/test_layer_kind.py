"""Which layers each adapter family asks of a recorded step: docs/gpu.md lists those of none."""

from __future__ import annotations

import warnings
from pathlib import Path

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.layer_kind import LayerKind, kind_of, least_kind
from loraplex_server.model.routed import slices_of
from tests.support.adapter_samples import SAMPLES
from tests.support.engines import running_engine
from tests.support.tiny_models import read_tensors, tiny_llama

# By the name that docs/gpu.md has for them.
SECOND_FORWARD = {
    "BOFT": "BOFT",
    "C3A": "C³A",
    "FOURIERFT": "FourierFT",
    "FROD": "FRoD",
    "FULL": "full fine-tunes",
    "GLORA": "GLoRA",
    "HIRA": "HiRA",
    "LN_TUNING": "LN tuning",
    "LOKR": "LoKr",
    "OFT": "OFT",
    "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "Super tuning",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}
BEYOND_LOW_RANK = {
    "IA3": LayerKind.INPUT_SCALES,
    "LORAMOE": LayerKind.ROUTED_PROJECTIONS,
    "MIXLORA": LayerKind.ROUTED_MLP,
    "MOLA": LayerKind.ROUTED_PROJECTIONS,
}


def kind_in(engine: Engine, plan: AdapterPlan) -> LayerKind | None:
    packer = engine.packer
    base = packer.capabilities
    return kind_of(
        packer.parts(plan),
        plan,
        outside={base.input_embedding, base.output_head},
        projections=slices_of(engine.loop.runner._model.groups.values()).keys(),
        lone=packer.lone,
    )


def test_every_family_is_recorded_or_listed(tmp_path: Path) -> None:
    model = tiny_llama()
    found = {}
    with running_engine(model) as engine:
        for family in SAMPLES:
            folder = tmp_path / family
            folder.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sample = SAMPLES[family](model, folder, True)
            plan = read_tensors(sample.config, sample.tensors, model, folder).plan
            found[family] = kind_in(engine, engine.packer.prepare(plan))
    assert {family for family, kind in found.items() if kind is None} == SECOND_FORWARD.keys()
    known = BEYOND_LOW_RANK | dict.fromkeys(SECOND_FORWARD)
    assert found == {family: known.get(family, LayerKind.LORA) for family in SAMPLES}


def test_layers_are_the_cheapest_that_compute_all_rows() -> None:
    kinds = list(LayerKind)
    for one in kinds:
        assert least_kind({one}) is one
        for other in kinds:
            both = least_kind({one, other})
            assert both.does(one)
            assert both.does(other)
            assert not any(kind.does(one) and kind.does(other) for kind in kinds[:both])
    # What few adapters need does not cost those that do without.
    assert not LayerKind.ROUTED_MLP.does(LayerKind.SLICE_SCALES)
    assert not LayerKind.ROUTED_PROJECTIONS.does(LayerKind.OWN_DOWNS)


def test_the_docs_list_what_takes_a_second_forward() -> None:
    page = (Path(__file__).parents[3] / "docs" / "gpu.md").read_text("utf-8")
    table = page.partition("### Adapters that take a second forward")[2].partition("\n## ")[0]
    assert [name for name in SECOND_FORWARD.values() if name not in table] == []
