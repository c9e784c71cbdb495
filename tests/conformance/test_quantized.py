"""A quantised base over HTTP: it and its adapters answer as models of the dequantised weights."""

import asyncio
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.expert_rows import EXPERT_ROWS
from tests.conformance.judge import explain
from tests.conformance.load import Answer, Question, ask_alone_and_together
from tests.conformance.oracle import load_base, make_peft, patched, sharing_copy
from tests.conformance.own_row import Random
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import save_base, serving
from tests.support.bases.awq_checkpoint import save_as_awq
from tests.support.bases.quantized_oracle import dequantized

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ROWS = {
    "lora": PeftRow("lora", lambda: LoraConfig(r=4, target_modules=_LINEARS), moved(0.1)),
    "dora": PeftRow(
        "dora", lambda: LoraConfig(r=4, use_dora=True, target_modules=_LINEARS), moved(0.1)
    ),
    "ia3": PeftRow(
        "ia3",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        moved(0.3),
    ),
}
_ROUTED = {row.id: row for row in EXPERT_ROWS if row.id in ("mixlora", "mola")}
_BASES = {row.id: row for row in BASE_ROWS if row.id in ("llama", "qwen3")}
_AWQ_GROUP = 32
_PROMPTS = tuple(
    tuple(torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (7, 40)
)


class _Larger(Random):
    """Draws that matter among three layers."""

    def __call__(self, *shape: int, std: float) -> Tensor:
        return super().__call__(*shape, std=5 * std)


@dataclass(frozen=True)
class _Served:
    models: list[dict[str, object]]  # of /v1/models
    alone: list[Answer]  # of the base
    together: dict[str, list[Answer]]  # by adapter; "": the base


@dataclass(frozen=True)
class _Case:
    base_id: str
    format: str  # "awq": the checkpoint is quantised already
    n_ranks: int = 1
    intermediate_size: int = 96

    def __str__(self) -> str:
        ranks = f"-{self.n_ranks} ranks" if self.n_ranks > 1 else ""
        return f"{self.base_id}-{self.format}{ranks}"

    def save(self, folder: Path) -> tuple[Path, PreTrainedModel, PreTrainedModel]:
        """The checkpoint, the model before it was quantised, and that of its weights."""
        row = _BASES[self.base_id]
        config = {**row.config, "intermediate_size": self.intermediate_size}
        path = save_base(replace(row, config=config), folder)
        plain = load_base(path)
        if self.format != "awq":
            return path, plain, dequantized(plain, self.format)
        base = load_base(path)
        for name, weight in save_as_awq(path, _AWQ_GROUP).items():
            base.get_submodule(name).weight.data.copy_(weight)
        return path, plain, base


_CASES = [
    _Case("llama", "int8"),
    _Case("llama", "int4"),
    _Case("qwen3", "fp8"),
    _Case("llama", "awq"),
    # inputs of o are cut within a group of 64, those of down between two
    _Case("llama", "int4", n_ranks=2, intermediate_size=128),
    _Case("qwen3", "awq", n_ranks=2, intermediate_size=192),
]


@pytest.mark.parametrize(
    "case",
    # CI starts the second process of one case, and the night that of the other.
    [
        *_CASES[:-2],
        pytest.param(_CASES[-2], marks=pytest.mark.slow),
        pytest.param(_CASES[-1], marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_a_quantised_base_answers_as_its_dequantised_weights(case: _Case, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path, plain, base = case.save(tmp_path / "base")
    routed = [name for name in _ROUTED if not (name == "mola" and case.n_ranks > 1)]  # refused
    oracles: dict[str, nn.Module] = {"": base, **_adapters(base, tmp_path, routed)}
    served = asyncio.run(_serve(path, tmp_path, list(oracles)[1:], case))
    wanted = "int4" if case.format == "awq" else case.format
    assert [m["quantization"] for m in served.models if m["parent"] is None] == [wanted]
    problems = []
    for name, model in oracles.items():
        for prompt, answer in zip(_PROMPTS, served.together[name], strict=True):
            # the 16-bit base must not explain the base's answers, nor the base an adapter's
            other = base if name else plain
            problem = explain(model, other, [Question(prompt, echo=True)], [answer])
            problems += [] if problem is None else [f"{name or 'base'}: {problem}"]
    assert problems == []
    assert served.together[""] == served.alone  # to the bit, whoever shares the steps


def _adapters(base: PreTrainedModel, folder: Path, routed_names: list[str]) -> dict[str, nn.Module]:
    """Name of the adapter, saved below ``folder`` → the model that answers as it should."""
    models: dict[str, nn.Module] = {}
    for name, row in _ROWS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models[name] = make_peft(row, sharing_copy(base), folder / name)
    for name in routed_names:
        routed = _ROUTED[name]
        made = routed.build(base, _Larger(name))
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(dict(made.config)))
        tensors = {key: value.contiguous() for key, value in made.tensors.items()}
        save_file(tensors, folder / name / "adapter_model.safetensors")
        models[name] = patched(base, made.forwards)
    return models


async def _serve(base: Path, folder: Path, names: list[str], case: _Case) -> _Served:
    quantization = "none" if case.format == "awq" else case.format
    async with serving(
        base,
        folder / "state",
        quantization=quantization,
        tensor_parallel_size=case.n_ranks,
    ) as client:
        models = (await client.get("/v1/models")).json()["data"]
        return _Served(models, *await ask_alone_and_together(client, folder, names, _PROMPTS))
