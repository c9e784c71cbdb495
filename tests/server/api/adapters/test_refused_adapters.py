"""PUT of an adapter with a fault: 4xx in OpenAI's form that names the tensor, and nothing stored.

A sample of families; ``tests/adapter_store/files/test_refusal_grid.py`` has every family and fault.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.limits import StoreLimits
from tests.server.conftest import Front, make_front
from tests.support.adapters.adapter_samples import NEVER_INERT, OPTIONAL, SAMPLES, UNRANKED, Sample
from tests.support.bases.tiny_models import tiny_llama

FAMILIES = ("LORA", "IA3", "MIXLORA", "OFT", "PROMPT_TUNING", "FULL")


class Cell(NamedTuple):
    sample: Sample
    told: str  # a pattern that the message must match


def missing_part(sample: Sample) -> Cell | None:
    optional = OPTIONAL.get(str(sample.config["peft_type"]), r"\Z\A")
    needed = [key for key in sample.tensors if not re.search(optional, key)]
    if not needed:
        return None
    key = max(needed)
    rest = {name: t for name, t in sample.tensors.items() if name != key}
    leaf = next((part for part in key.split(".") if part.endswith("_proj")), key.split(".")[-1])
    return Cell(Sample(sample.config, rest or {"stray": torch.ones(1)}), re.escape(leaf))


def extra_target(sample: Sample) -> Cell | None:
    sample.tensors["model.layers.0.self_attn.v_proj.stray"] = torch.ones(2, 2)
    return Cell(sample, "v_proj")


def embedding_target(sample: Sample) -> Cell | None:
    targets = sample.config.get("target_modules")
    if not targets or sample.config["peft_type"] == "TRAINABLE_TOKENS":
        return None
    sample.config["target_modules"] = [*targets, "embed_tokens"]
    return Cell(sample, "embed_tokens")


def another_bases_copy(sample: Sample) -> Cell | None:
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    sample.tensors[key] = torch.randn(64, 32)
    return Cell(sample, re.escape("embed_tokens.base_layer.weight"))


def not_finite(sample: Sample) -> Cell | None:
    floats = [key for key, tensor in sample.tensors.items() if tensor.is_floating_point()]
    key = min(floats, key=len)
    sample.tensors[key].view(-1)[0] = float("inf")
    return Cell(sample, f"{re.escape(key.rpartition('.')[2])}.*(NaN or Inf|differs)")


def unknown_option(sample: Sample) -> Cell | None:
    sample.config["rescale_every"] = 3
    return Cell(sample, "rescale_every")


FAULTS: tuple[Callable[[Sample], Cell | None], ...] = (
    *(missing_part, extra_target, embedding_target, another_bases_copy, not_finite),
    unknown_option,
)


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_llama(), "tiny/llama")


@pytest.fixture(scope="module")
def open_front(
    tokenizer: PreTrainedTokenizerFast, spec: BaseSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    front = make_front(tokenizer, spec, tmp_path_factory.mktemp("open"))
    yield front
    front.store.close()


@pytest.fixture(scope="module")
def narrow_front(
    tokenizer: PreTrainedTokenizerFast, spec: BaseSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    limits = StoreLimits(max_rank=1, max_virtual_tokens=1)
    front = make_front(tokenizer, spec, tmp_path_factory.mktemp("narrow"), limits=limits)
    yield front
    front.store.close()


def upload(front: Front, sample: Sample) -> tuple[int, dict[str, object]]:
    """PUT as a multipart form; the status and the body."""
    tensors = {name: tensor.contiguous() for name, tensor in sample.tensors.items()}
    files = {
        "config": ("adapter_config.json", json.dumps(sample.config).encode()),
        "weights": ("adapter_model.safetensors", save(tensors)),
    }
    answer = asyncio.run(front.client.put("/v1/adapters/x", files=files))
    return answer.status_code, answer.json()


def check_refused(front: Front, sample: Sample, told: str, *, status: int = 400) -> None:
    answered, body = upload(front, sample)
    error = body["error"]
    assert isinstance(error, dict)
    assert (answered, error["type"]) == (status, "invalid_request_error"), error
    assert re.search(told, error["message"], re.DOTALL), error["message"]
    assert front.store.list() == ()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_is_a_400_that_names_it(
    family: str, fault: Callable[[Sample], Cell | None], open_front: Front, tmp_path: Path
) -> None:
    cell = fault(SAMPLES[family](tiny_llama(), tmp_path, True))
    if cell is None:
        pytest.skip("this family has no such fault")
    check_refused(open_front, cell.sample, cell.told)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNRANKED))
def test_a_rank_above_the_limit_is_too_large(
    family: str, narrow_front: Front, tmp_path: Path
) -> None:
    sample = SAMPLES[family](tiny_llama(), tmp_path, True)
    told = r"_proj has rank \d|\d virtual tokens|rank 1 keeps .*_proj"
    check_refused(narrow_front, sample, told, status=400 if family == "FULL" else 413)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NEVER_INERT))
def test_an_adapter_that_was_never_trained_is_a_400(
    family: str, open_front: Front, tmp_path: Path
) -> None:
    sample = SAMPLES[family](tiny_llama(), tmp_path, False)
    check_refused(open_front, sample, "would do nothing|nothing that differs")
