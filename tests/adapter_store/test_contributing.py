"""The family that CONTRIBUTING.md shows is read as it says there."""

from pathlib import Path

import pytest
import torch

from loraplex_adapter_store.families import table
from loraplex_adapter_store.families.low_rank import deltas
from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.bases.tiny_models import read_tensors, tiny_llama

_PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def test_the_family_of_contributing_reads_what_ours_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _PAGE.read_text(encoding="utf-8").partition("**An adapter family**")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    scope = dict(vars(deltas))  # what that file imports
    exec(compile(code, str(_PAGE), "exec"), scope)
    sample = SAMPLES["SORA"](tiny_llama(), tmp_path, True)
    ours = read_tensors(sample.config, sample.tensors, tiny_llama(), tmp_path)
    monkeypatch.setitem(table.FAMILIES, "SORA", scope["read_sora"])  # type: ignore[arg-type]
    shown = read_tensors(sample.config, sample.tensors, tiny_llama(), tmp_path)
    assert shown.plan.family is ours.plan.family
    assert set(shown.plan.modules) == set(ours.plan.modules)
    assert shown.report.matched == ours.report.matched
    for name, module in ours.plan.modules.items():
        other = shown.plan.modules[name]
        assert module.a is not None
        assert module.b is not None
        assert other.a is not None
        assert other.b is not None
        torch.testing.assert_close(other.b @ other.a, module.b @ module.a)
