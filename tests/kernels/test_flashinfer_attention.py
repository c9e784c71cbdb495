"""FlashInfer behind ``paged_attention``: what it is given, by its published signatures."""

import ast
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex_kernels.errors import KernelUnavailable
from loraplex_kernels.layers.flashinfer_attention import (
    CapturedAttention,
    FlashInferAttention,
    PlannedAttention,
)
from loraplex_kernels.layers.model_ops import paged_attention, paged_attention_reference, write_kv
from tests.support.gpu.flashinfer_stand_in import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    install_flashinfer,
)

CPU = torch.device("cpu")
PAGE = 8
LENS, QUERIES = (40, 8, 17, 1), (1, 8, 5, 1)  # full pages, a prompt, a chunk, a first token


class Step:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        n_pages = [-(-n // PAGE) for n in LENS]
        order = torch.randperm(sum(n_pages), generator=generator).int()
        self.table = torch.full((len(LENS), 7), 99, dtype=torch.int32)  # no such page
        self.packed = [torch.full((len(order), 2, PAGE, 64), torch.nan) for _ in "kv"]
        self.rows = [cache.clone() for cache in self.packed]  # as a GPU has them
        first = 0
        for r, (n, length) in enumerate(zip(n_pages, LENS, strict=True)):
            self.table[r, :n] = order[first : first + n]
            first += n
            place = torch.arange(length)
            page = self.table[r].long()[place // PAGE]
            k, v = torch.randn(2, length, 2, 64, generator=generator)
            write_kv(k, v, *self.packed, page * PAGE + place % PAGE)
            for cache, values in zip(self.rows, (k, v), strict=True):
                cache[page, :, place % PAGE] = values
        # Between the keys, as in the packed product of a layer.
        self.q = torch.randn(sum(QUERIES), 9, 64, generator=generator)[:, 1:7]
        self.starts = torch.tensor([0, *QUERIES]).cumsum(0).int()

    def planned(self, library: FlashInferAttention) -> PlannedAttention:
        return PlannedAttention(library, np.array(QUERIES), np.array(LENS), self.table)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_gives_what_the_reference_gives(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrappers = install_flashinfer(monkeypatch)
    step = Step()
    shared = (step.table, step.starts, torch.tensor(LENS).int())
    kind = {"scale": 0.2, "window": window, "softcap": softcap}
    wanted = paged_attention_reference(step.q, *step.packed, *shared, **kind)
    planned = step.planned(FlashInferAttention(CPU))
    for _ in range(3):  # layers
        out = torch.full_like(wanted, torch.nan).contiguous()
        paged_attention(step.q, *step.rows, *shared, **kind, out=out, planned=planned)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert [(w.n_plans, w.n_runs) for w in wrappers] == [(1, 3)]


@pytest.mark.parametrize("window", [None, 6])
def test_a_captured_step_of_any_lengths_gives_what_the_reference_gives(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph, whose first replays have spare requests; layers of two kinds."""
    wrappers = install_flashinfer(monkeypatch)
    step = Step()
    table = torch.zeros(4, 7, dtype=torch.int32)
    captured = CapturedAttention(FlashInferAttention(CPU), table, table.new_zeros(4 * 7))
    q, starts = step.q[:4], torch.arange(5, dtype=torch.int32)
    kinds = [{"scale": 0.2, "window": w, "softcap": None} for w in (None, window)]
    for lens in ((), (9,), (40, 1), (17, 8, 40), (8, 16, 17, 1)):
        n = len(lens)
        rows = [max(range(4), key=lambda r: LENS[r] >= n_kv) for n_kv in lens]
        table[:n] = step.table[rows]
        captured.plan(np.array(lens, dtype=np.int64))
        for kind in kinds:
            out = torch.empty(q.shape)  # of padding rows, too
            paged_attention(q, *step.rows, table, starts, starts, **kind, out=out, planned=captured)
            shared = (table[:n], starts[: n + 1], torch.tensor(lens).int())
            wanted = paged_attention_reference(q[:n], *step.packed, *shared, **kind)
            torch.testing.assert_close(out[:n], wanted, rtol=1e-5, atol=1e-5)
    n_kinds = 1 if window is None else 2
    assert [type(w) for w in wrappers] == [BatchDecodeWithPagedKVCacheWrapper] * n_kinds


def test_layers_of_another_kind_have_a_plan_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wrappers = install_flashinfer(monkeypatch)
    step, library = Step(), FlashInferAttention(CPU)
    for _ in range(4):  # steps
        planned = step.planned(library)
        for window in (None, 6, None, 6):  # as in Gemma
            out = torch.empty(step.q.shape)
            planned.attend(step.q, *step.rows, scale=0.1, window=window, softcap=None, out=out)
    assert [(w.n_plans, w.n_runs) for w in wrappers] == [(2, 4)] * 4  # two of a kind, in turn


def test_a_plan_is_not_taken_for_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    wrappers = install_flashinfer(monkeypatch)
    step = Step()
    planned = step.planned(FlashInferAttention(CPU))
    shared = (step.table.clone(), step.starts, torch.tensor(LENS).int())
    out = paged_attention(step.q, *step.packed, *shared, scale=0.2, planned=planned)
    assert torch.equal(out, paged_attention(step.q, *step.packed, *shared, scale=0.2))
    assert wrappers == []


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(KernelUnavailable, match="flashinfer"):
        FlashInferAttention(CPU)


def test_what_it_does_not_serve_has_a_reason() -> None:
    misfit = FlashInferAttention.misfit
    assert misfit((9, 0), torch.bfloat16, 128) is None
    assert "7.5" in str(misfit((7, 5), torch.float16, 128))
    assert "float32" in str(misfit((9, 0), torch.float32, 128))
    assert "96" in str(misfit((8, 0), torch.bfloat16, 96))


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
@pytest.mark.parametrize("method", ["__init__", "plan", "run", "reset_workspace_buffer"])
@pytest.mark.parametrize(
    ("file", "stand_in"),
    [
        ("prefill.py", BatchPrefillWithPagedKVCacheWrapper),
        ("decode.py", BatchDecodeWithPagedKVCacheWrapper),
    ],
)
def test_the_stand_in_has_the_signatures_of_the_wheel(
    file: str, stand_in: type, method: str
) -> None:
    """Read, not imported: that needs CUDA."""
    spec = find_spec("flashinfer")
    assert spec is not None
    assert spec.origin is not None
    if method not in vars(stand_in):
        return  # inherited or not used
    tree = ast.parse(Path(spec.origin).with_name(file).read_text("utf-8"))
    (wrapper,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == stand_in.__name__
    )
    methods = {node.name: node.args for node in wrapper.body if isinstance(node, ast.FunctionDef)}
    published = methods[method]
    ours = inspect.signature(getattr(stand_in, method)).parameters
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {n for n, p in ours.items() if p.kind is p.KEYWORD_ONLY}
    assert positional == [argument.arg for argument in published.args][: len(positional)]
    if published.kwarg is not None:
        published = methods["_plan_impl"]
    assert keywords <= {argument.arg for argument in (*published.args, *published.kwonlyargs)}


def test_strided_queries_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the packed product q, k and v stand in one row."""
    install_flashinfer(monkeypatch)
    step = Step()
    assert not step.q.is_contiguous()
    out: Tensor = torch.empty(step.q.shape)
    step.planned(FlashInferAttention(CPU)).attend(
        step.q, *step.rows, scale=0.1, window=None, softcap=None, out=out
    )
    assert bool(out.isfinite().all())
