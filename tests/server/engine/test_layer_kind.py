"""The captured layers of each adapter family; docs/gpu-steps.md lists families with none."""

import warnings
from pathlib import Path

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.engine.adapters.layer_kind import LayerKind, kind_of
from loraplex_server.engine.engine import Engine
from loraplex_server.model.layers.routed import slices_of
from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.bases.tiny_models import read_tensors, tiny_llama
from tests.support.servers.engines import running_engine

# By the name that docs/gpu-steps.md has for them.
SECOND_FORWARD = {
    "BOFT": "BOFT",
    "C3A": "C³A",
    "FOURIERFT": "FourierFT",
    "FROD": "FRoD",
    "FULL": "full fine-tunes",
    "GLORA": "GLoRA",
    "HIRA": "HiRA",
    "IA3": "IA³",
    "LN_TUNING": "LN tuning",
    "LOKR": "LoKr",
    "LORAMOE": "LoRAMoE",
    "MOLA": "MoLA",
    "OFT": "OFT",
    "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "Super tuning",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}


def kind_in(engine: Engine, plan: AdapterPlan) -> LayerKind | None:
    packer = engine.packer
    base = packer.capabilities
    return kind_of(
        packer.parts(plan),
        plan,
        outside={base.input_embedding, base.output_head},
        projections=slices_of(engine.loop.runner._model.groups.values()).keys(),
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
    known = {"MIXLORA": LayerKind.ROUTED_MLP, **dict.fromkeys(SECOND_FORWARD)}
    assert found == {family: known.get(family, LayerKind.LORA) for family in SAMPLES}


def test_the_docs_list_what_takes_a_second_forward() -> None:
    page = (Path(__file__).parents[3] / "docs" / "gpu-steps.md").read_text("utf-8")
    table = page.partition("### Adapters that take a second forward")[2].partition("\n## ")[0]
    assert [name for name in SECOND_FORWARD.values() if name not in table] == []
