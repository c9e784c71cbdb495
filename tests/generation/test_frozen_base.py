from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loraplex_generation.base_weights import HeldLinear
from loraplex_generation.frozen_base import FrozenBase, LoraFA, base_fingerprint
from loraplex_generation.known_rows import KnownRows
from loraplex_generation.layout import AdapterLayout
from loraplex_generation.packing import Row, pack
from loraplex_generation.scoring import score_groups
from loraplex_generation.zoo.tasks import Task
from tests.support.tiny_zoo import (
    tiny_base,
    tiny_codec,
    tiny_directory,
    tiny_qwen2_directory,
)


@pytest.fixture(scope="module", params=[tiny_directory, tiny_qwen2_directory])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = request.param(tmp_path_factory.mktemp("base"))
    return made


@pytest.fixture(scope="module")
def base(directory: Path) -> FrozenBase:
    return tiny_base(directory)


def _layout(base: FrozenBase) -> AdapterLayout:
    return AdapterLayout(base.shape, first_layer=1, rank=3, alpha=6.0, seed=4)


def _nll_by_transformers(model: LlamaForCausalLM, head: tuple[int, ...], row: Row) -> torch.Tensor:
    ids = torch.tensor([[*head, *row.tokens]])
    with torch.no_grad():
        log = model(ids).logits[0].log_softmax(-1)
    n, length = row.n_answer, ids.shape[1]
    return -log[length - n - 1 : length - 1].gather(1, ids[0, length - n :, None])[:, 0]


@pytest.mark.parametrize("moves_a", [False, True], ids=["A is shared", "A is its own"])
def test_packed_adapters_score_as_peft_scores_each_alone(
    base: FrozenBase, directory: Path, tmp_path: Path, moves_a: bool
) -> None:
    codec, layout = tiny_codec(), _layout(base)
    names = ("list-reverse/json", "past/plain", "card.it/caps")
    groups = [
        [codec.row(e) for e in Task.parse(n).examples("train", k)]
        for n, k in zip(names, (3, 1, 4), strict=True)
    ]
    size = layout.full_size if moves_a else layout.size
    vectors = 0.3 * torch.randn(3, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = base.score(pack(codec.head, groups), LoraFA(layout, vectors, torch.float32)).nll
    theirs = []
    for i, rows in enumerate(groups):
        config, tensors = layout.peft(vectors[i], "tiny")
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        adapted = PeftModel.from_pretrained(model, folder)
        theirs += [_nll_by_transformers(adapted, codec.head, row) for row in rows]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=2e-4, rtol=1e-4)


def test_without_adapters_it_is_the_base(base: FrozenBase, directory: Path) -> None:
    codec = tiny_codec()
    rows = [codec.row(e) for e in Task.parse("initials/tag").examples("train", 5)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = base.score(pack(codec.head, [rows])).nll
    theirs = torch.cat([_nll_by_transformers(model, codec.head, row) for row in rows])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.5, 2.0, 3.0, 4.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 256,
    },
}


@pytest.mark.parametrize("kind", _ROPE)
def test_scaled_positions_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **_ROPE[kind]}
    folder = tiny_directory(tmp_path, spread=0.4, rope_parameters=rope)
    codec = tiny_codec()
    rows = [codec.row(e) for e in Task.parse("initials/tag").examples("train", 3)]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = tiny_base(folder).score(pack(codec.head, [rows])).nll
    theirs = torch.cat([_nll_by_transformers(model, codec.head, row) for row in rows])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_a_row_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tiny_directory(tmp_path, max_position_embeddings=8))
    codec = tiny_codec()
    rows = [codec.row(e) for e in Task.parse("initials/tag").examples("train", 1)]
    with pytest.raises(ValueError, match="longer than the base's 8 positions"):
        base.score(pack(codec.head, [rows]))


@pytest.mark.parametrize(
    "field", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}], ids=str
)
def test_layers_that_this_forward_does_not_compute_are_refused(
    field: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        tiny_base(tiny_directory(tmp_path, **field))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no map of the memory to read")
def test_mapped_weights_stay_in_the_file_and_compute_the_same(
    directory: Path, base: FrozenBase
) -> None:
    mapped = FrozenBase(directory, dtype=torch.float32, mapped=True)
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(directory / "model.safetensors"))
    ]
    linears = mapped._layers[0][:4]
    assert all(isinstance(linear, HeldLinear) for linear in linears)
    weights = [mapped.output_head, *(w for linear in linears for w in linear.weights)]
    for weight in weights:
        assert any(first <= weight.data_ptr() < last for first, last in ranges)
    codec = tiny_codec()
    batch = pack(codec.head, [[codec.row(e) for e in Task.parse("email/tag").examples("train", 4)]])
    torch.testing.assert_close(mapped.score(batch).nll, base.score(batch).nll)


def test_rows_do_not_see_each_other(base: FrozenBase) -> None:
    codec = tiny_codec()
    rows = [codec.row(e) for e in Task.parse("email/tag").examples("train", 4)]
    together = score_groups(base, pack(codec.head, [rows]))[0].nll * sum(r.n_answer for r in rows)
    alone = sum(score_groups(base, pack(codec.head, [[row]]))[0].nll * row.n_answer for row in rows)
    assert together == pytest.approx(alone, rel=1e-4)


def test_what_the_layers_below_make_of_a_row_is_the_same_in_every_batch(base: FrozenBase) -> None:
    codec, layout = tiny_codec(), _layout(base)
    rows = [codec.row(e) for e in Task.parse("email/tag").examples("train", 5)]
    known = KnownRows(base, layout.first_layer, codec.head)
    vectors = 0.3 * torch.randn(2, layout.size, generator=torch.Generator().manual_seed(3))
    known.batch([rows[:2]])
    batch, below = known.batch([rows[3:], [rows[1], rows[4], rows[0]]])
    adapters = LoraFA(layout, vectors, torch.float32)
    torch.testing.assert_close(
        base.score(batch, adapters, below).nll, base.score(batch, adapters).nll
    )


def test_the_gradient_of_what_an_adapter_adds_is_its_difference(base: FrozenBase) -> None:
    layout = AdapterLayout(base.shape, first_layer=2, rank=2, alpha=4.0, seed=4)
    torch.manual_seed(5)
    x = torch.randn(2, 3, base.shape.hidden_size, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(2, layout.full_size, dtype=torch.float64, requires_grad=True)

    def added(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        adapters = LoraFA(layout, vectors, torch.float64)
        return torch.cat([adapters.qkv(x, 2), adapters.o(x, 2)], -1)

    assert torch.autograd.gradcheck(added, (x, vectors), fast_mode=True)


def test_the_gradient_reaches_every_adapted_b_and_only_its_own_adapter(base: FrozenBase) -> None:
    codec, layout = tiny_codec(), _layout(base)
    rows = [codec.row(e) for e in Task.parse("past/tag").examples("train", 2)]
    vectors = torch.zeros(2, layout.size, requires_grad=True)
    batch = pack(codec.head, [rows, rows])
    nll = base.score(batch, LoraFA(layout, vectors, torch.float32)).nll
    nll[batch.adapter[batch.row] == 0].sum().backward()
    assert vectors.grad is not None
    assert all(part.any() for part in torch.split(vectors.grad[0], layout.b_sizes))
    assert not vectors.grad[1].any()


@pytest.mark.parametrize("moves_a", [False, True], ids=["A is shared", "A is its own"])
def test_the_norm_of_a_generated_update_is_that_of_its_dense_form(
    base: FrozenBase, moves_a: bool
) -> None:
    layout = _layout(base)
    size = layout.full_size if moves_a else layout.size
    vector = torch.randn(size, generator=torch.Generator().manual_seed(2))
    a = layout.a_of(vector)
    dense = sum(
        float((layout.scale * b @ a[key]).square().sum())
        for key, b in layout.unflatten(vector).items()
    )
    assert layout.delta_norm(vector) == pytest.approx(dense**0.5, rel=1e-4)


def test_the_fingerprint_tells_weights_apart(directory: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = tiny_directory(tmp_path)
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(other)
    assert base_fingerprint(other) != base_fingerprint(directory)


def test_another_kind_of_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'llama'"):
        FrozenBase(tmp_path)
