"""The map from texts to adapters, trained on a random base of three layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation.description_reader import DescriptionReader, train_description_reader
from loraplex_generation.dressings import Dressings, contents_of
from loraplex_generation.errors import GeneratorMismatch, NotTrained
from loraplex_generation.group_codes import GroupCodes
from loraplex_generation.guard import OodDetector
from loraplex_generation.label_reader import LabelReader, ReaderRecipe
from loraplex_generation.library import Subspace
from loraplex_generation.scoring import TeacherForced
from loraplex_generation.sentences import Encoded
from loraplex_generation.taskdata import TaskData
from loraplex_generation.tensor_file import read_tensor_file, write_tensor_file
from loraplex_generation.text_map import TEXT_MAP_FILE, TextMap
from loraplex_generation.text_map_training import (
    Start,
    TextMapRecipe,
    TextMapTraining,
    refit_reader,
)
from loraplex_generation.zoo.tasks import Task
from loraplex_generation.zoo_training import ZooTraining
from tests.support.tiny_zoo import HashedWords, tiny_base, tiny_codec, tiny_directory

NAMES = ("past/plain", "past/quotes", "plural/plain", "plural/caps", "list-first/quotes")
TASKS = [Task.parse(name) for name in NAMES]
RECIPE = TextMapRecipe(
    n_steps=60,
    n_directions=12,
    tasks_per_step=3,
    tokens_per_task=60,
    lr_rows=2e-2,
    lr_directions=1e-2,
    lr_codes=2e-2,
    warmup=2,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("base"), spread=0.3)  # wide: quick to teach


@pytest.fixture(scope="module")
def reader() -> DescriptionReader:
    recipe = ReaderRecipe(n_steps=200)
    return train_description_reader(HashedWords(), Dressings.of(TASKS), contents_of(TASKS), recipe)


def _training(
    base: Path, recipe: TextMapRecipe = RECIPE, *, beside: TextMap | None = None
) -> TextMapTraining:
    frozen = tiny_base(base)
    layout = ZooTraining.layout_for(frozen)
    if beside is None:
        start = Start.of_rows(TASKS, layout.size, recipe.n_directions)
    else:
        start = Start.beside(beside, recipe.n_directions)
    return TextMapTraining(frozen, layout, TaskData(tiny_codec()), TASKS, recipe, start)


def _silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(
    base: Path, reader: DescriptionReader, tmp_path_factory: pytest.TempPathFactory
) -> TextMap:
    training = _training(base)
    training.run(tmp_path_factory.mktemp("state") / "state.safetensors", report=_silent)
    return training.finished(reader, TASKS)


def _scores(base: Path, text_map: TextMap, tasks: list[Task], texts: list[str]) -> list[float]:
    """Of rows that no training saw, under what the texts become; without texts, the base."""
    data = TaskData(tiny_codec())
    score = TeacherForced(tiny_base(base), data.head, text_map.layout)
    encoder = HashedWords()
    vectors = None
    if texts:
        points = [text_map.point(text_map.read(encoder.encode([text]))) for text in texts]
        vectors = torch.stack([text_map.vector(point) for point in points])
    return [s.nll for s in score(data.eval_rows(tasks, 8, split="validation"), vectors)]


def test_the_sentence_makes_the_task_likelier_and_that_of_another_less_so(
    base: Path, trained: TextMap
) -> None:
    texts = [task.descriptions()[-1] for task in TASKS]
    before = _scores(base, trained, TASKS, [])
    after = _scores(base, trained, TASKS, texts)
    swapped = _scores(base, trained, TASKS, texts[2:] + texts[:2])
    assert all(a < 0.85 * b for a, b in zip(after, before, strict=True))
    assert sum(after) < sum(swapped)


def test_a_reading_of_a_sentence_is_what_another_content_does(base: Path, trained: TextMap) -> None:
    """In the format that was read."""
    asked = HashedWords().encode([Task.parse("plural/quotes").descriptions()[0]])
    assert list(trained.readings(asked, 1)) == ["plural"]
    readings = trained.readings(asked, 3)
    assert set(readings) == {"past", "plural", "list-first"}
    data = TaskData(tiny_codec())
    score = TeacherForced(tiny_base(base), data.head, trained.layout)

    def nll(reading: str, task: str) -> float:
        rows = data.eval_rows([Task.parse(task)], 8, split="validation")
        return score(rows, trained.vector(trained.point(readings[reading]))[None])[0].nll

    assert nll("past", "past/quotes") < nll("plural", "past/quotes")
    own = trained.points_of([Task.parse("past/quotes"), Task.parse("past/plain")])
    read = trained.point(readings["past"])
    assert (read - own[0]).norm() < 0.5 * (read - own[1]).norm()


def test_a_reading_has_the_language_of_its_content() -> None:
    tasks = [Task.parse(name) for name in ("date.de/plain", "date.fr/quotes", "past/plain")]
    dressings = Dressings.of(tasks)
    german = dressings.exact_points(tasks)[0]
    assert dressings.in_language(german, "fr").tolist() == [1, 0, 1, 1, 0]
    assert dressings.in_language(german, "").tolist() == [1, 0, 0, 1, 0]


def test_a_format_goes_with_an_operation_that_never_had_it(base: Path, trained: TextMap) -> None:
    new = [Task.parse("past/caps"), Task.parse("plural/quotes")]
    texts = [task.descriptions()[0] for task in new]
    read = [trained.read(HashedWords().encode([text])).dressing for text in texts]
    caps, quotes = (trained.dressings.names.index(name) for name in ("caps", "quotes"))
    assert read[0][caps] > 0.8 > 0.2 > read[0][quotes]
    assert read[1][quotes] > 0.8 > 0.2 > read[1][caps]
    before, after = _scores(base, trained, new, []), _scores(base, trained, new, texts)
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    base: Path, reader: DescriptionReader, trained: TextMap, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        if "step 40" in line:
            raise Stop

    state = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        _training(base).run(state, report=stop, every_s=0)
    lines: list[str] = []
    again = _training(base)
    again.run(state, report=lines.append)
    assert lines[0] == "going on from step 40"
    assert torch.equal(again.finished(reader, TASKS).rows, trained.rows)


def test_the_finished_directions_are_orthogonal_and_give_the_adapters_that_were_trained(
    base: Path, reader: DescriptionReader, tmp_path: Path
) -> None:
    training = _training(base, replace(RECIPE, n_steps=4))
    training.run(tmp_path / "state.safetensors", report=_silent)
    made = training.finished(reader, TASKS)
    directions = made.rows[len(made.dressings.names) :].float()
    gram = F.normalize(directions, dim=1) @ F.normalize(directions, dim=1).T
    assert (gram - torch.eye(len(gram))).abs().max() < 0.02  # they are kept in bfloat16
    wanted = training.vectors(TASKS)
    assert (made.vector(made.points) - wanted).norm() < 0.01 * wanted.norm()


def test_training_beside_a_map_keeps_its_rows_and_makes_the_tasks_likelier(
    base: Path, reader: DescriptionReader, trained: TextMap, tmp_path: Path
) -> None:
    shipped = TextMap.load(trained.save(tmp_path))
    recipe = replace(RECIPE, n_steps=40, n_directions=4)
    training = _training(base, recipe, beside=shipped)
    training.run(tmp_path / "state.safetensors", report=_silent)
    made = training.finished(reader, TASKS)
    n = len(shipped.rows)
    assert torch.equal(made.rows[:n], shipped.rows)
    assert n < len(made.rows) <= n + 4
    wanted = training.vectors(TASKS)
    assert (made.vector(made.points) - wanted).norm() < 0.01 * wanted.norm()
    again = TextMap.load(made.save(tmp_path))
    assert torch.equal(again.rows[:n], shipped.rows)
    texts = [task.descriptions()[0] for task in TASKS]
    assert sum(_scores(base, again, TASKS, texts)) < sum(_scores(base, shipped, TASKS, texts))


def test_a_saved_map_is_the_map_up_to_its_codes(trained: TextMap, tmp_path: Path) -> None:
    again = TextMap.load(trained.save(tmp_path))
    assert again.tasks == NAMES
    assert again.reader.limit == trained.reader.limit
    encoded = HashedWords().encode([TASKS[0].descriptions()[0]])
    kept, made = (m.vector(m.point(m.read(encoded))) for m in (again, trained))
    assert F.cosine_similarity(kept, made, dim=0) > 0.98
    once_more = TextMap.load(again.save(tmp_path / "again"))
    assert torch.equal(once_more.rows, again.rows)


def test_reading_is_learnt_anew_and_what_the_map_does_keeps_its_bits(
    trained: TextMap, tmp_path: Path
) -> None:
    known = HashedWords().encode([task.descriptions()[0] for task in TASKS])
    reader = trained.reader
    forgetful = replace(
        reader,
        guard=OodDetector(reader.guard.whiten * 0, reader.guard.operations * 0),
        language=LabelReader(reader.language.shape).eval(),
        format=LabelReader(reader.format.shape).eval(),
        content=LabelReader(reader.content.shape).eval(),
        limit=0.0,
    )
    before = read_tensor_file(replace(trained, reader=forgetful).save(tmp_path)).tensors
    path = refit_reader(tmp_path, HashedWords(), ReaderRecipe(n_steps=200))
    after = read_tensor_file(path).tensors
    kept = {name for name in before if torch.equal(before[name], after[name])}
    kept -= {name for name in kept if name.startswith("language.")}  # these tasks have but "none"
    assert kept == {"rows.codes", "rows.scales", "codes", "dressing_codes"}
    again = TextMap.load(path)
    assert (again.reader.scores(known) < again.reader.limit).all()
    read, expected = (m.point(m.read(known)) for m in (again, trained))
    torch.testing.assert_close(read, expected, atol=0.01, rtol=0)  # the file's rounding


def test_without_a_map_there_is_nothing_to_read_for(tmp_path: Path) -> None:
    with pytest.raises(NotTrained, match="generator text-map"):
        refit_reader(tmp_path, HashedWords())


def test_a_reading_of_many_contents_is_stranger_than_one_of_two(trained: TextMap) -> None:
    """With the same largest share: what is left of it may lie on one other content, or on all."""

    class Shares(LabelReader):
        def shares(self, encoded: Encoded) -> Tensor:
            return torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.6, 0.2, 0.2]])

    same = HashedWords().encode([TASKS[0].descriptions()[0]] * 3)
    scored = replace(trained.reader, content=Shares(trained.reader.content.shape)).scores(same)
    doubt = scored - trained.reader.guard.score(same.sentence)
    expected = torch.tensor([0.0, 0.6730, 0.9503]) / 4  # entropies, in nats
    torch.testing.assert_close(doubt, expected, atol=1e-4, rtol=0)


def test_it_names_the_tasks_that_are_close(trained: TextMap) -> None:
    encoded = HashedWords().encode(["Keep only the first item in double quotes"])
    assert trained.nearest(encoded, 2)[0][0] == "list-first/quotes"
    parts = trained.parts(trained.read(encoded))
    assert parts["quotes"] > 0.8
    assert parts["list-first"] > 0.8


def test_a_sentence_of_other_words_is_stranger_than_a_known_one(trained: TextMap) -> None:
    known = [task.descriptions()[0] for task in TASKS]
    strange = ["sing me a lullaby about dragons", "who won football yesterday"]
    reader = trained.reader
    assert (reader.scores(HashedWords().encode(known)) < reader.limit).all()
    assert (reader.scores(HashedWords().encode(strange)) > reader.limit).all()


def test_its_span_holds_the_adapters_of_all_tasks(trained: TextMap) -> None:
    adapters = trained.points @ trained.rows.float()
    span, expected = trained.span(), Subspace.of(adapters)
    assert span.size == expected.size
    torch.testing.assert_close(span.mean, adapters.mean(0), atol=1e-5, rtol=1e-4)
    back = span.mean + span.project(adapters) @ span.directions
    assert (back - adapters).norm() < 0.02 * adapters.norm()


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / TEXT_MAP_FILE, {}, {"format": "loraplex-text-map-0"})
    with pytest.raises(GeneratorMismatch, match="generator text-map"):
        TextMap.load(tmp_path / TEXT_MAP_FILE)


def test_a_run_begins_with_the_rows_that_were_trained_before(base: Path) -> None:
    frozen = tiny_base(base)
    layout = ZooTraining.layout_for(frozen)
    known = {name: torch.randn(layout.size) for name in ("mean", "caps", "past", "plural")}
    start = Start.of_rows(TASKS, layout.size, RECIPE.n_directions, known)
    training = TextMapTraining(frozen, layout, TaskData(tiny_codec()), TASKS, RECIPE, start)
    before = training.vectors([Task.parse("past/caps")])[0]
    torch.testing.assert_close(before, known["mean"] + known["caps"])


def test_four_bits_err_by_a_tenth_of_the_spread_and_keep_zeros() -> None:
    rows = torch.randn(3, 200) * torch.tensor([[1.0], [1e-3], [0.0]])
    back = GroupCodes.of(rows).rows(200)
    assert back.shape == rows.shape
    for one, other in zip(rows[:2], back[:2], strict=True):
        assert (one - other).std() < 0.12 * one.std()
    assert not back[2].any()
