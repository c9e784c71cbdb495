"""What the load of a base takes beside what it leaves."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex_kernels.layers import packed_linear
from loraplex_server.model import packing
from loraplex_server.model.base_model import BaseModel
from tests.support.bases.architectures import tiny_model

# The checkpoint is mapped: what the kernel can drop again (RssFile) is not counted.
MEASURE = """
import json, sys, threading, torch
from pathlib import Path
from loraplex_server.model.base_model import BaseModel, load_base_model
from tests.support.bases.architectures import tiny_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

BaseModel(tiny_model("llama").bfloat16(), "tiny")  # imports, and the heap of a first model
before, peak, ended = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
base = load_base_model(Path(sys.argv[1]), "base", dtype=torch.bfloat16, device=torch.device("cpu"))
ended.set()
thread.join()
weights = sum(g.packed.n_bytes for g in base.groups.values()) + base._embedding.weight.nbytes
print(json.dumps({"peak": peak - before, "weights": weights}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_load_of_the_default_base_peaks_at_little_more_than_its_weights(
    pulled_base: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(pulled_base)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["weights"] > 150e6
    assert measured["peak"] <= 1.1 * measured["weights"], measured


def test_originals_are_freed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU there is room for the weights and for one group beside them."""
    model = tiny_model("llama")
    originals = {
        name: weakref.ref(parameter)
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    }
    alive: list[int] = []

    class Counting(packed_linear.PackedLinear):
        def __init__(self, weights: list[Tensor], *args: object, **kwargs: object) -> None:
            alive.append(sum(original() is not None for original in originals.values()))
            super().__init__(weights, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "PackedLinear", Counting)
    base = BaseModel(model, "tiny", self_check=False)
    assert len(originals) == 21
    in_order = [len(g.module_names) for g in base.groups.values() if g is not base.head]
    assert alive[: len(in_order)] == [21 - sum(in_order[:i]) for i in range(len(in_order))]
    assert not any(original() is not None for original in originals.values())


def test_the_spec_reads_what_is_packed_and_holds_nothing() -> None:
    model = tiny_model("llama")
    name = "model.layers.1.self_attn.k_proj"
    weight = model.get_parameter(f"{name}.weight").detach().clone()
    original = weakref.ref(model.get_parameter(f"{name}.weight"))
    base = BaseModel(model, "tiny", self_check=False)
    assert original() is None
    assert torch.equal(base.spec.weight(name), weight)
    assert torch.equal(base.spec.stored(name), weight)
    assert base.spec.norms[name] == pytest.approx(float(weight.norm()), rel=1e-6)
