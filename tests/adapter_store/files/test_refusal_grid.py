"""Every family × every fault: refused with the name of the module or tensor, or served exactly.

A new family needs one row in ``tests/support/adapters/adapter_samples.py``. The faults are the
same for all.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store import families
from loraplex_adapter_store.errors import (
    AdapterRefused,
    BaseMismatch,
    LimitExceeded,
    MalformedFile,
)
from loraplex_adapter_store.families.table import FAMILIES
from loraplex_adapter_store.fold.reader import Reading
from loraplex_adapter_store.limits import StoreLimits
from tests.support.adapters.adapter_samples import NEVER_INERT, OPTIONAL, SAMPLES, UNRANKED, Sample
from tests.support.bases.tiny_models import read_tensors, tiny_llama

NAMES = sorted(FAMILIES)


@pytest.fixture(scope="module")
def sample_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sample]:
    """sample_of(family, trained=True) → a fresh copy of that family's sample."""
    made: dict[tuple[str, bool], Sample] = {}

    def sample(family: str, *, trained: bool = True) -> Sample:
        key = family, trained
        if key not in made:
            made[key] = SAMPLES[family](tiny_llama(), tmp_path_factory.mktemp(family), trained)
        config, tensors = made[key]
        return Sample(dict(config), {name: tensor.clone() for name, tensor in tensors.items()})

    return sample


def read(sample: Sample, folder: Path, limits: StoreLimits | None = None) -> Reading:
    return read_tensors(sample.config, sample.tensors, tiny_llama(), folder, limits)


def refusal(sample: Sample, folder: Path, *, limits: StoreLimits | None = None) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        read(sample, folder, limits)
    return caught.value


def kinds(tensors: dict[str, Tensor]) -> list[str]:
    """Return one tensor name for each kind. Names of a kind differ only in numbers."""
    return list({re.sub(r"\d+", "#", name): name for name in tensors}.values())


def names_it(error: AdapterRefused, key: str) -> bool:
    """True if the message has the name of the tensor or of its module."""
    text = str(error)
    leaves = [part for part in key.split(".") if part.endswith(("_proj", "norm", "embed_tokens"))]
    return key in text or any(leaf in text for leaf in [*leaves, key.rpartition(".")[2]])


def test_every_family_has_a_sample() -> None:
    assert set(FAMILIES) <= set(SAMPLES), "add a row to tests/support/adapters/adapter_samples.py"


@pytest.mark.parametrize("family", NAMES)
def test_the_sample_itself_is_served(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    report = read(sample_of(family), tmp_path).report
    assert set(report.matched) == set(sample_of(family).tensors)


@pytest.mark.parametrize("family", NAMES)
def test_a_missing_part(family: str, sample_of: Callable[..., Sample], tmp_path: Path) -> None:
    for key in kinds(sample_of(family).tensors):
        if re.search(OPTIONAL.get(family, r"\Z\A"), key):
            continue
        sample = sample_of(family)
        del sample.tensors[key]
        if not sample.tensors:
            sample.tensors["stray"] = torch.ones(1)
        error = refusal(sample, tmp_path)
        assert names_it(error, key), f"without {key}: {error}"


@pytest.mark.parametrize("family", NAMES)
def test_a_target_without_tensors(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = sample_of(family)
    lost = [key for key in sample.tensors if ".layers.0." in key and "q_proj" in key]
    if family == "FULL" or not lost:
        pytest.skip("its tensors are no parts of targeted modules")
    for key in lost:
        del sample.tensors[key]
    assert "layers.0.self_attn.q_proj" in str(refusal(sample, tmp_path))


@pytest.mark.parametrize("family", NAMES)
def test_an_extra_target(family: str, sample_of: Callable[..., Sample], tmp_path: Path) -> None:
    sample = sample_of(family)
    extra = [key for key in sample.tensors if ".layers.0." in key and "q_proj" in key]
    for key in extra if family != "FULL" else ():
        sample.tensors[key.replace("q_proj", "v_proj")] = sample.tensors[key].clone()
    sample.tensors["model.layers.0.self_attn.v_proj.stray"] = torch.ones(2, 2)
    assert "v_proj" in str(refusal(sample, tmp_path))


@pytest.mark.parametrize("family", NAMES)
def test_a_rank_above_the_limit(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    limits = StoreLimits(max_rank=1, max_virtual_tokens=1)
    if family in UNRANKED:
        read(sample_of(family), tmp_path, limits)
        return
    error = refusal(sample_of(family), tmp_path, limits=limits)
    assert isinstance(error, LimitExceeded) or family == "FULL"
    assert re.search(r"_proj has rank \d|\d virtual tokens|rank 1 keeps .*_proj", str(error))


@pytest.mark.parametrize("family", ["MIXLORA", "MOLA", "LORAMOE"])
def test_more_experts_than_the_limit(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    error = refusal(sample_of(family), tmp_path, limits=StoreLimits(max_experts=2))
    assert isinstance(error, LimitExceeded)


@pytest.mark.parametrize("family", NAMES)
def test_an_embedding_target(family: str, sample_of: Callable[..., Sample], tmp_path: Path) -> None:
    sample = sample_of(family)
    targets: Any = sample.config.get("target_modules")
    if not targets or family == "TRAINABLE_TOKENS":
        pytest.skip("the config targets no modules, or embeddings only")
    sample.config["target_modules"] = [*targets, "embed_tokens"]
    assert "embed_tokens" in str(refusal(sample, tmp_path))


@pytest.mark.parametrize("family", NAMES)
def test_another_base_by_its_fingerprint(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = sample_of(family)
    sample.config["loraplex_base_fingerprint"] = "0" * 64
    assert isinstance(refusal(sample, tmp_path), BaseMismatch)


@pytest.mark.parametrize("family", [name for name in NAMES if name != "FULL"])
def test_a_copy_of_another_base(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = sample_of(family)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    sample.tensors[key] = torch.randn(64, 32)
    assert "embed_tokens" in str(refusal(sample, tmp_path))


@pytest.mark.parametrize("family", NAMES)
def test_a_value_that_is_not_finite(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    for key in kinds(sample_of(family).tensors):
        sample = sample_of(family)
        if not sample.tensors[key].is_floating_point():
            continue
        sample.tensors[key].view(-1)[-1] = float("nan")
        error = refusal(sample, tmp_path)
        is_copy = "differs from" in str(error)
        assert isinstance(error, MalformedFile) or is_copy
        assert names_it(error, key), str(error)


@pytest.mark.parametrize("family", NAMES)
def test_an_adapter_that_was_never_trained(
    family: str, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = sample_of(family, trained=False)
    if family in NEVER_INERT:
        read(sample, tmp_path)
        return
    error = refusal(sample, tmp_path)
    assert re.search("would do nothing|nothing that differs", str(error)), str(error)


@pytest.mark.parametrize("index", [64, -1, True, "5"])
def test_token_ids_that_are_none_of_the_base(
    index: object, sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = sample_of("TRAINABLE_TOKENS")
    sample.config["token_indices"] = [5, index]
    assert "ids below 64" in str(refusal(sample, tmp_path))


def test_factors_whose_product_overflows_are_refused_by_module(
    sample_of: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = sample_of("LOHA")
    for tensor in sample.tensors.values():
        tensor.fill_(1e30)
    assert re.search("_proj: .* overflows float32", str(refusal(sample, tmp_path)))


def test_tensors_are_grouped_by_module_in_one_place_only() -> None:
    """No family may bypass the checks of ``module_groups``."""
    folder = Path(families.__file__).parent
    users = [
        path.name
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and any(alias.name == "group_by_module" for alias in node.names)
    ]
    assert users == ["module_groups.py"]
