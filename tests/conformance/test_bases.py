"""Every base over HTTP, alone and under LoRAs, against transformers and PEFT; or refused at start.

`docs/bases.md` calls exact what is a row here.
"""

import asyncio
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from loraplex_server.model.errors import ModelError
from tests.conformance.base_rows import BASE_ROWS, BaseRow
from tests.conformance.judge import explain
from tests.conformance.load import Answer, Put, Question, ask_all, put_upload
from tests.conformance.oracle import load_base, make_peft
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import save_base, serving
from tests.support.adapters.single_experts import save_single_experts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_PROMPTS = tuple(
    tuple(
        torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    )
    for length in (7, 40)  # the second is longer than every window
)


def _cases() -> list[Any]:
    cases = []
    for row in BASE_ROWS:
        wrong = pytest.mark.xfail(reason=str(row.wrong), strict=True)
        cases.append(pytest.param(row, id=row.id, marks=[] if row.wrong is None else [wrong]))
    return cases


@pytest.mark.parametrize("row", _cases())
def test_a_base_answers_as_transformers_does_or_does_not_start(
    row: BaseRow, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    path = save_base(row, tmp_path / row.id)
    if row.refused is not None:
        with pytest.raises(ModelError, match=row.refused):
            asyncio.run(_load(path, tmp_path, []))
        return
    base = load_base(path)
    models = _adapters(row, base, tmp_path)
    puts, answers = asyncio.run(_load(path, tmp_path, list(models)))
    for name, put in puts.items():
        assert put.status == 201, f"{name}: {put.message}"
    problems = []
    for name in answers:
        given = answers[name]
        model, plain = (base, None) if name == "" else (models[name], base)
        for prompt, answer in zip(_PROMPTS, given, strict=True):
            # alone: some rotary embeddings look at the longest sequence of a batch
            problem = explain(model, plain, [Question(prompt, echo=True)], [answer])
            problems += [] if problem is None else [f"{name or 'base'}: {problem}"]
    assert problems == []


def _adapters(row: BaseRow, base: PreTrainedModel, folder: Path) -> dict[str, nn.Module]:
    """Name of the adapter, saved below ``folder`` → PEFT's model with it."""
    models: dict[str, nn.Module] = {}
    for name, options in {"lora": {}, **row.adapters}.items():
        config = {"r": 4, "target_modules": list(row.targets), **options}
        lora = PeftRow(name, lambda config=config: LoraConfig(**config), moved(0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models[name] = make_peft(lora, copy.deepcopy(base), folder / name)
    if row.single_experts:
        path = folder / "single-experts"
        save_single_experts(base, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = PeftModel.from_pretrained(copy.deepcopy(base), path)
        models[path.name] = tuned.eval()
    return models


async def _load(
    base: Path, folder: Path, names: list[str]
) -> tuple[dict[str, Put], dict[str, list[Answer]]]:
    async with serving(base, folder / "state") as client:
        puts = {name: await put_upload(client, name, folder / name) for name in names}
        asked = [(name, prompt) for name in ("", *names) for prompt in _PROMPTS]
        questions = [Question(prompt, name or None, echo=True) for name, prompt in asked]
        given = await ask_all(client, questions)
    answers: dict[str, list[Answer]] = {"": [], **{name: [] for name in names}}
    for (name, _), answer in zip(asked, given, strict=True):
        answers[name].append(answer)
    return puts, answers
