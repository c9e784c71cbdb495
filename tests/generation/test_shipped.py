"""The files that are shipped, with the base and the encoder that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from loraplex_generation.decoding import greedy_reply
from loraplex_generation.errors import OutOfDistribution
from loraplex_generation.frozen_base import FrozenBase, LoraFA
from loraplex_generation.library import LIBRARY_FILE
from loraplex_generation.packing import ChatCodec
from loraplex_generation.scoring import score_groups
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.service import Generator
from loraplex_generation.shipped import shipped_folder
from loraplex_generation.taskdata import TaskData
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generator(pulled_base: Path, pulled_encoder: Path) -> Generator:
    return Generator.load(
        shipped_folder(),
        SentenceEncoder(pulled_encoder),
        base_name="smollm2-135m-instruct",
        base_directory=pulled_base,
    )


@pytest.fixture(scope="module")
def base(pulled_base: Path) -> FrozenBase:
    return FrozenBase(pulled_base)


@pytest.fixture(scope="module")
def codec(pulled_base: Path) -> ChatCodec:
    return ChatCodec(AutoTokenizer.from_pretrained(pulled_base))


def test_the_library_is_small_enough_to_ship() -> None:
    assert (shipped_folder() / LIBRARY_FILE).stat().st_size <= 25e6


def test_combinations_that_were_never_trained_become_far_likelier(
    generator: Generator, base: FrozenBase, codec: ChatCodec
) -> None:
    tasks = [Task.parse(name) for name in load_split().sets["validation"][:4]]
    made = [generator.generate(task.test_descriptions()[0]) for task in tasks]
    batch = TaskData(codec).eval_batch(tasks, 6, split="test")
    vectors = torch.stack([one.vector for one in made])
    before = score_groups(base, batch)
    after = score_groups(base, batch, LoraFA(made[0].layout, vectors, base.dtype))
    gains = [1 - a.nll / b.nll for a, b in zip(after, before, strict=True)]
    assert sum(gains) / len(gains) > 0.7
    assert all(gain > 0.3 for gain in gains)


def test_the_state_of_the_base_tells_icm_lora_the_task(
    generator: Generator, base: FrozenBase, codec: ChatCodec
) -> None:
    tasks = [Task.parse(name) for name in load_split().sets["validation"][:3]]
    batch = TaskData(codec).eval_batch(tasks, 6, split="test")
    before = score_groups(base, batch)
    for n_prompts in (0, 8):
        made = [
            generator.generate(
                task.test_descriptions()[0],
                prompts=[example.prompt for example in task.examples("train", n_prompts)],
                method="icm-lora",
            )
            for task in tasks
        ]
        vectors = torch.stack([one.vector for one in made])
        after = score_groups(base, batch, LoraFA(made[0].layout, vectors, base.dtype))
        gains = [1 - a.nll / b.nll for a, b in zip(after, before, strict=True)]
        assert sum(gains) / len(gains) > 0.6  # the mean of the library gains a quarter


def test_a_sentence_of_a_user_visibly_changes_the_reply(
    generator: Generator, base: FrozenBase, codec: ChatCodec
) -> None:
    made = generator.generate("please wrap the person's initials in an answer tag")
    reply = greedy_reply(base, codec, "Grace Hopper", made.layout, made.vector)
    assert reply == "<answer>G.H.</answer>"


def test_unrelated_wishes_are_refused(generator: Generator) -> None:
    for text in ("Write a poem about the sea", "Explain quantum mechanics", "asdf qwer zxcv"):
        with pytest.raises(OutOfDistribution):
            generator.generate(text)
