"""Every form of adapter over HTTP, against PEFT's own models and against published formulas.

One server in float32 gets all rows of the tables and answers them in one shuffled load, between
rows of the base. The base is six trained layers and 8,192 tokens of the default base; at night
the same rows are served on the whole default base, too. `docs/families.md` calls exact
what is a row here.
"""

import asyncio
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from tests.conformance.expert_rows import EXPERT_ROWS
from tests.conformance.head_rows import HEAD_ROWS
from tests.conformance.heads import explain_head, with_head
from tests.conformance.judge import explain
from tests.conformance.load import Answer, Put, Question, ask_all, put_all
from tests.conformance.lora_rows import LORA_ROWS
from tests.conformance.mixture_rows import MIXTURE_ROWS, MixtureRow
from tests.conformance.oracle import load_base, make_peft, patched, save_short_base, sharing_copy
from tests.conformance.own_row import OwnRow, Random
from tests.conformance.own_rows import OWN_ROWS
from tests.conformance.peft_row import LAYERS, PeftRow
from tests.conformance.peft_rows import PEFT_ROWS
from tests.support.servers.server_process import server_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first row waits for the whole load
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPTS = (
    (504, 3575, 282, 4649, 314),  # "The capital of France is"
    (6403, 1980, 253, 655, 665, 436, 253, 4197, 617),  # "Once upon a time there was a king who"
)
_N_BASE_ROWS = 8
_MODES: dict[str, tuple[str, ...]] = {
    "native": (),
    "whole-base": (),
    "references": ("--kernels", "reference"),
    "unfused": ("--no-fuse",),
}
Row = PeftRow | OwnRow | MixtureRow
ROWS: tuple[Row, ...] = (
    *LORA_ROWS,
    *PEFT_ROWS,
    *OWN_ROWS,
    *EXPERT_ROWS,
    *MIXTURE_ROWS,
    *HEAD_ROWS,
)
_ROW_OF = {row.id: row for row in ROWS}


@dataclass(frozen=True)
class Oracles:
    path: Path  # of the base
    base: PreTrainedModel
    models: dict[str, nn.Module]  # by row, where the row is served
    folders: dict[str, Path]


@dataclass(frozen=True)
class Load:
    """The answers of one server to all its rows."""

    puts: dict[str, Put]
    questions: dict[str, list[Question]]  # by row; "": the base
    answers: dict[str, list[Answer]]
    log: str


def _runs(mode: str, row: Row) -> bool:
    return mode in ("native", "whole-base") or (row.executor and row.refused is None)


@pytest.fixture(scope="module")
def short_oracles(
    request: pytest.FixtureRequest, pulled_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Oracles]:
    folder = tmp_path_factory.mktemp("short")
    base = save_short_base(pulled_base, folder / "base", n_layers=6, n_tokens=8192)
    yield build_oracles(_selected(request.session.items), base, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole_oracles(
    request: pytest.FixtureRequest, pulled_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Oracles]:
    folder = tmp_path_factory.mktemp("whole")
    yield build_oracles(_selected(request.session.items), pulled_base, folder)
    shutil.rmtree(folder)


@pytest.fixture
def oracles(request: pytest.FixtureRequest, mode: str) -> Oracles:
    name = "whole_oracles" if mode == "whole-base" else "short_oracles"
    found: Oracles = request.getfixturevalue(name)
    return found


def build_oracles(rows: Sequence[Row], base: Path, folder: Path) -> Oracles:
    """Saves the adapters of the rows below ``folder``; parts of a mixture stand before it."""
    torch.set_num_threads(1)
    found = Oracles(base, load_base(base), {}, {})
    for row in rows:
        path = folder / row.id
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _make(row, found, path)
        if row.refused is None:
            found.models[row.id] = model
        if not isinstance(row, MixtureRow):
            found.folders[row.id] = path
    return found


def _selected(items: Sequence[pytest.Item]) -> list[Row]:
    """The rows whose tests run (all of them without -k), with the parts of mixtures."""
    names: set[str] = set()
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and item.path == Path(__file__):
            names |= {str(parameters.params.get("row"))}
    for row in MIXTURE_ROWS:
        if row.id in names:
            names |= {name for name, _ in row.parts}
    return [row for row in ROWS if row.id in names]


def _make(row: Row, oracles: Oracles, path: Path) -> nn.Module:
    """Saves the row's adapter to ``path`` and returns the model that answers as it should."""
    if isinstance(row, PeftRow):
        own = LAYERS if row.rewrites_base else ()
        model = sharing_copy(oracles.base, own=own)
        return make_peft(row, model if row.task is None else with_head(model, row.task), path)
    if isinstance(row, MixtureRow):
        return _mixed(row, oracles)
    adapter = row.build(oracles.base, Random(row.id))
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(dict(adapter.config)))
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return patched(oracles.base, adapter.forwards)


def _mixed(row: MixtureRow, oracles: Oracles) -> nn.Module:
    """PEFT's own exact weighted sum: factors side by side."""
    (first, *rest) = [name for name, _ in row.parts]
    model = peft.PeftModel.from_pretrained(
        sharing_copy(oracles.base), oracles.folders[first], adapter_name=first
    )
    for name in rest:
        model.load_adapter(oracles.folders[name], adapter_name=name)
    names, weights = zip(*row.parts, strict=True)
    model.add_weighted_adapter(list(names), list(weights), "mixed", combination_type="cat")
    model.set_adapter("mixed")
    return model.eval()


class _Loads:
    """The loads by mode. A mode's server starts when its first row is tested."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[str, Load] = {}
        self._failed: dict[str, BaseException] = {}

    def of(self, mode: str, oracles: Oracles) -> Load:
        if mode in self._failed:
            raise self._failed[mode]
        if mode not in self._done:
            try:
                self._done[mode] = self._run(mode, oracles)
            except BaseException as error:  # told for every row, tried once
                self._failed[mode] = error
                raise
        return self._done[mode]

    def _run(self, mode: str, oracles: Oracles) -> Load:
        made = oracles.folders.keys() | oracles.models.keys()
        rows = [row for row in ROWS if row.id in made and _runs(mode, row)]
        folders = [oracles.folders[row.id] for row in rows if row.id in oracles.folders]
        state, shelf = self._folder / mode, self._folder / f"{mode}-shelf"
        shelf.mkdir()
        flags = ("--kv-memory", "128MiB", "--adapter-memory", "512MiB", "--adapters-dir", shelf)
        with server_process(oracles.path, state, *flags, *_MODES[mode]) as server:
            load = asyncio.run(load_rows(server.url, rows, folders, shelf))
        shutil.rmtree(state)
        shutil.rmtree(shelf)
        return Load(*load, server.log)


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> _Loads:
    return _Loads(tmp_path_factory.mktemp("loads"))


async def load_rows(
    url: str, rows: list[Row], folders: list[Path], shelf: Path
) -> tuple[dict[str, Put], dict[str, list[Question]], dict[str, list[Answer]]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        puts = await put_all(client, folders, shelf)
        questions = {"": [Question(p, echo=e) for p in PROMPTS for e in (True, False)]}
        questions[""] *= _N_BASE_ROWS // len(questions[""])
        for row in rows:
            if row.refused is None:
                questions[row.id] = _questions(row, puts)
        flat = [(name, question) for name, asked in questions.items() for question in asked]
        answers = await ask_all(client, [question for _, question in flat])
    by_row: dict[str, list[Answer]] = {name: [] for name in questions}
    for (name, _), answer in zip(flat, answers, strict=True):
        by_row[name].append(answer)
    return puts, questions, by_row


def _questions(row: Row, puts: dict[str, Put]) -> list[Question]:
    """The first by name, with the prompt's log-probabilities; the second by name and digest."""
    if isinstance(row, MixtureRow):
        parts = [{"name": name, "weight": weight} for name, weight in row.parts]
        return [Question(PROMPTS[0], parts, echo=True), Question(PROMPTS[1], parts)]
    pinned = f"{row.id}@{puts[row.id].digest[:16]}"
    if isinstance(row, PeftRow) and row.task is not None:
        names = (row.id, pinned)
        return [Question(p, n, task=row.task) for p, n in zip(PROMPTS, names, strict=True)]
    return [Question(PROMPTS[0], row.id, echo=True), Question(PROMPTS[1], pinned)]


def _cases() -> Iterator[object]:
    for mode in _MODES:
        for row in ROWS:
            if row.refused is None and _runs(mode, row):
                wrong = pytest.mark.xfail(reason=str(row.wrong), strict=True)
                marks = [] if row.wrong is None else [wrong]
                marks += [] if mode == "native" else [pytest.mark.nightly]
                yield pytest.param(mode, row.id, id=f"{mode}-{row.id}", marks=marks)


@pytest.mark.parametrize(("mode", "row"), list(_cases()))
def test_an_adapter_answers_as_the_model_it_was_trained_in(
    loads: _Loads, oracles: Oracles, mode: str, row: str
) -> None:
    load = loads.of(mode, oracles)
    put = load.puts.get(row)
    assert put is None or put.status == 201, put.message
    model, questions, answers = oracles.models[row], load.questions[row], load.answers[row]
    base = oracles.base if mode == "native" else None  # that it matters is shown once
    judge = explain if questions[0].task is None else explain_head
    assert (problem := judge(model, base, questions, answers)) is None, problem


_BY_MODE = [
    pytest.param(mode, marks=[] if mode == "native" else [pytest.mark.nightly]) for mode in _MODES
]


@pytest.mark.parametrize("mode", _BY_MODE)
def test_base_rows_between_adapters_are_the_base(
    loads: _Loads, oracles: Oracles, mode: str
) -> None:
    load = loads.of(mode, oracles)
    problem = explain(oracles.base, None, load.questions[""], load.answers[""])
    assert problem is None, problem


@pytest.mark.parametrize("row", [row.id for row in ROWS if row.refused is not None])
def test_what_cannot_be_served_is_refused_with_the_reason(
    loads: _Loads, short_oracles: Oracles, row: str
) -> None:
    put = loads.of("native", short_oracles).puts[row]
    assert put.status == 400, "it is served: say so in its row"
    assert re.search(str(_ROW_OF[row].refused), put.message), put.message


@pytest.mark.parametrize("mode", _BY_MODE)
def test_each_mode_runs_what_it_says(loads: _Loads, oracles: Oracles, mode: str) -> None:
    log = loads.of(mode, oracles).log
    assert ("transformers' layers" in log) == (mode == "unfused")
    assert ("PyTorch references" in log) == (mode == "references")
