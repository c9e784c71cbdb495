"""Task vectors are the bare base's own states: transformers is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loraplex_generation.chat_base import ChatBase
from loraplex_generation.errors import UnfitPrompts
from loraplex_generation.task_vectors import TaskVectors, train_conditions
from loraplex_generation.zoo.tasks import Task
from tests.support.tiny_zoo import tiny_base, tiny_codec, tiny_directory

CODEC = tiny_codec()
PROMPTS = [f"word {letter}" for letter in "abcdefghijklmnopqrs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("base"), spread=0.3)


@pytest.fixture(scope="module")
def reader(folder: Path) -> TaskVectors:
    return TaskVectors(lambda: ChatBase(tiny_base(folder), CODEC))


@torch.inference_mode()
def _last_state(folder: Path, text: str) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[*CODEC.head, *CODEC.prompt(text).tokens]])
    state: torch.Tensor = model.model(tokens).last_hidden_state[0, -1]  # behind the final norm
    return state


def test_a_description_alone_is_read_off_its_last_token(reader: TaskVectors, folder: Path) -> None:
    expected = _last_state(folder, "Reverse the list")
    torch.testing.assert_close(reader.of("Reverse the list"), expected, atol=1e-4, rtol=1e-4)


def test_prompts_are_led_by_the_description_and_averaged(reader: TaskVectors, folder: Path) -> None:
    states = [_last_state(folder, f"Reverse it\n{prompt}") for prompt in PROMPTS]
    expected = torch.stack(states).mean(0)
    torch.testing.assert_close(reader.of("Reverse it", PROMPTS), expected, atol=1e-4, rtol=1e-4)


def test_too_few_prompts_are_refused_with_the_number_that_is_wanted(reader: TaskVectors) -> None:
    with pytest.raises(UnfitPrompts, match="at least 8 prompts, not 1"):
        reader.of("Reverse it", PROMPTS[:1])


def test_the_base_is_loaded_once_and_only_when_it_is_asked(folder: Path) -> None:
    loads: list[int] = []

    def load() -> ChatBase:
        loads.append(1)
        return ChatBase(tiny_base(folder), CODEC)

    reader = TaskVectors(load)
    assert not loads
    assert torch.equal(reader.of("one"), reader.of("one"))
    reader.of("two")
    assert len(loads) == 1


def test_training_conditions_name_their_task(reader: TaskVectors) -> None:
    tasks = [Task.parse("past/caps"), Task.parse("plural/plain")]
    found = train_conditions(reader, tasks)
    assert found.owner.bincount().tolist() == [24, 24]  # 16 wordings, 8 of them with prompts too
    assert torch.equal(found.vectors[0], reader.of(tasks[0].descriptions()[0]))
    assert found.vectors.unique(dim=0).shape == found.vectors.shape
