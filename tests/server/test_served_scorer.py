"""Scores through the engine are those of the training's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.packing import Row
from loraplex_generation.scoring import TeacherForced
from loraplex_generation.zoo.tasks import Example
from loraplex_generation.zoo_training import ZooTraining
from loraplex_router.experts import arrow_prototypes
from server.benchmarks.served_scorer import ServedScorer
from tests.support.engines import running_engine
from tests.support.tiny_zoo import tiny_base, tiny_codec, tiny_directory

CODEC = tiny_codec()
WORDS = [a + b for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that ends its turn at once after many prompts, though not after all."""
    folder = tiny_directory(tmp_path_factory.mktemp("base"), spread=0.3)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = model.get_input_embeddings().weight.data
    noise = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    tokens[CODEC.end] = tokens[3] + 0.1 * noise  # 3 is what it would rather say
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedScorer]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    root = tmp_path_factory.mktemp("store")
    layout = ZooTraining.layout_for(tiny_base(folder))
    with (
        AdapterStore(
            root,
            BaseSpec.of(model, "tiny"),
            gate_of=arrow_prototypes,
        ) as store,
        running_engine(model, max_queue=1 << 16) as engine,
    ):
        yield ServedScorer(engine, store, CODEC, layout)
        assert not store.list()


@pytest.fixture(scope="module")
def forced(folder: Path) -> TeacherForced:
    base = tiny_base(folder)
    return TeacherForced(base, CODEC.head, ZooTraining.layout_for(base))


def _rows(answer: str, words: list[str]) -> list[Row]:
    return [CODEC.row(Example(word, answer)) for word in words]


def test_the_base_is_scored_as_in_training(served: ServedScorer, forced: TeacherForced) -> None:
    groups = [_rows("", WORDS[at : at + 40]) for at in range(0, len(WORDS), 40)]
    ours, theirs = served(groups, None), forced(groups, None)
    assert [s.right for s in ours] == [s.right for s in theirs]
    right = [hit for score in ours for hit in score.right]
    assert any(right)
    assert not all(right)
    assert [s.nll for s in ours] == pytest.approx([s.nll for s in theirs], abs=1e-3)


def test_each_group_is_scored_under_its_own_adapter(
    served: ServedScorer, forced: TeacherForced, folder: Path
) -> None:
    size = ZooTraining.layout_for(tiny_base(folder)).size
    vectors = 0.3 * torch.randn(3, size, generator=torch.Generator().manual_seed(1))
    groups = [_rows("many", WORDS[:4])] * 3
    ours = [score.nll for score in served(groups, vectors)]
    assert ours == pytest.approx([s.nll for s in forced(groups, vectors)], abs=1e-3)
    assert len({round(nll, 3) for nll in ours}) == 3


def test_arrow_routes_in_the_engine_as_in_training(
    served: ServedScorer, forced: TeacherForced, folder: Path
) -> None:
    size = ZooTraining.layout_for(tiny_base(folder)).size
    experts = 0.3 * torch.randn(6, size, generator=torch.Generator().manual_seed(2))
    groups = [_rows("many", WORDS[:4]), _rows("few", WORDS[4:9])]
    ours = [score.nll for score in served.arrow(groups, experts)]
    assert ours == pytest.approx([s.nll for s in forced.arrow(groups, experts)], abs=1e-3)
    one = [score.nll for score in served(groups, experts[:2])]
    assert not any(a == pytest.approx(b, abs=1e-2) for a, b in zip(ours, one, strict=True))
