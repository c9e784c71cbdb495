"""From tasks to a served adapter, end to end, on a random base of three layers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from typer.testing import CliRunner

from adapter_store.benchmarks.evaluation.evaluation import evaluate
from adapter_store.benchmarks.evaluation.evidence import write_evidence
from adapter_store.benchmarks.evaluation.raw_weights import RawWeightRecipes
from adapter_store.benchmarks.evaluation.results import GUARDED, best_method
from loraplex_generation.bundle import GENERATOR_FILE, JOINT_FILE, Bundle, replace_guard
from loraplex_generation.cli.generator import generator as generator_command
from loraplex_generation.errors import (
    GeneratorMismatch,
    NotTrained,
    OutOfDistribution,
    UnfitPrompts,
)
from loraplex_generation.experts import ExpertRecipe
from loraplex_generation.frozen_base import base_fingerprint
from loraplex_generation.guard import OodDetector
from loraplex_generation.icm_lora import ICM_ON_RAW_WEIGHTS, IcmRecipe
from loraplex_generation.joint import JointRecipe
from loraplex_generation.label_reader import ReaderRecipe
from loraplex_generation.library import LIBRARY_FILE, Library
from loraplex_generation.service import Generator
from loraplex_generation.sg_lora import SG_ON_RAW_WEIGHTS, SgRecipe
from loraplex_generation.task_vectors import TaskVectors, train_conditions
from loraplex_generation.taskdata import TaskData
from loraplex_generation.tensor_file import read_tensor_file, write_tensor_file
from loraplex_generation.text_map import TEXT_MAP_FILE, TextMap
from loraplex_generation.text_map_training import TextMapRecipe, train_text_map
from loraplex_generation.training import refit_guard, train_bundle
from loraplex_generation.zoo.split import ZooSplit
from loraplex_generation.zoo.tasks import Task
from loraplex_generation.zoo_training import ZooTraining
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tiny_zoo import HashedWords, tiny_base, tiny_codec, tiny_directory

SPLIT = ZooSplit(
    sets={
        "train": (
            "past/plain",
            "past/quotes",
            "plural/plain",
            "plural/caps",
            "list-first/quotes",
            "list-first/caps",
        ),
        "validation": ("list-last/plain",),
        "h1": ("past/caps", "plural/quotes"),
        "h2": (),
        "h3": (),
    },
    digests={},
)
MAPPED = ("gerund/plain", "gerund/quotes")  # of the text map alone
RECIPE = JointRecipe(n_steps=60, tasks_per_step=3, tokens_per_task=60, lr=5e-2, warmup=2)
EXPERT = ExpertRecipe(
    max_steps=4, chunk=2, lr=1e-2, tokens_per_task=60, snapshots=2, validation_rows=4
)


def _zoo(
    folder: Path, shipped: Path, recipe: JointRecipe = RECIPE, *, multi_task_steps: int = 2
) -> ZooTraining:
    return ZooTraining(
        folder,
        shipped,
        joint=recipe,
        expert=EXPERT,
        oracle=EXPERT,
        multi_task_steps=multi_task_steps,
        split=SPLIT,
    )


def _run(zoo: ZooTraining, base: Path, **options: object) -> list[str]:
    lines: list[str] = []
    zoo.run(base, HashedWords(), tiny_tokenizer(), report=lines.append, **options)  # type: ignore[arg-type]
    return lines


def _export(zoo: ZooTraining, base: Path) -> Path:
    return zoo.export(base, HashedWords(), tiny_tokenizer(), report=lambda _: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("base"), spread=0.3)  # wide: quick to teach


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ZooTraining:
    root = tmp_path_factory.mktemp("zoo")
    zoo = _zoo(root / "state", root / "shipped")
    _run(zoo, base)
    return zoo


@pytest.fixture(scope="module")
def shipped(trained: ZooTraining, base: Path) -> Path:
    folder = _export(trained, base).parent
    known = [Task.parse(name) for name in Library.load(folder / LIBRARY_FILE).tasks]
    bundle = train_bundle(
        folder,
        HashedWords(),
        sg=SgRecipe(n_steps=30, hidden=16, latent=4),
        icm=IcmRecipe(n_steps=4, batch=4, latent=8, channels=(4, 4, 4)),
        conditions=train_conditions(_reader(base), known),
    )
    bundle.save(folder)
    return folder


def test_training_makes_every_task_likelier(trained: ZooTraining) -> None:
    experts = trained.experts()
    assert [e.card.task for e in experts] == list(SPLIT.sets["train"])
    assert all(e.card.nll < 0.9 * e.card.base_nll for e in experts)
    assert all(e.card.nll <= e.card.start_nll for e in experts)
    assert set(trained.oracles()) == {"past/caps", "plural/quotes", "list-last/plain"}
    assert trained.status().complete


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    base: Path, tmp_path: Path, trained: ZooTraining
) -> None:
    half = _zoo(tmp_path / "state", tmp_path / "shipped")
    _stop_after(half, base, n_lines=1)
    assert 0 < half.status().joint_step < RECIPE.n_steps
    lines = _run(_zoo(tmp_path / "state", tmp_path / "shipped"), base, stages=("joint",))
    assert lines[0].startswith("going on from step")
    assert torch.equal(half.joint_vectors()[0], trained.joint_vectors()[0])


def test_the_multi_task_adapter_goes_on_from_its_checkpoint(
    base: Path, tmp_path: Path, trained: ZooTraining
) -> None:
    def zoo(n_steps: int) -> ZooTraining:
        return _zoo(tmp_path / "state", tmp_path / "shipped", multi_task_steps=n_steps)

    _run(zoo(1), base, stages=("multi-task",))
    assert zoo(2).multi_task() is None
    _run(zoo(2), base, stages=("multi-task",))
    whole, resumed = trained.multi_task(), zoo(2).multi_task()
    assert whole is not None
    assert resumed is not None
    assert whole.count_nonzero()
    assert torch.equal(resumed, whole)


def test_finished_tasks_are_not_trained_again(base: Path, trained: ZooTraining) -> None:
    lines = _run(_zoo(trained.folder, trained.folder / "none"), base)
    assert not [line for line in lines if "NLL" in line]


def test_without_its_state_a_run_goes_on_from_what_was_shipped(
    base: Path, shipped: Path, tmp_path: Path
) -> None:
    zoo = _zoo(tmp_path / "gone", shipped)
    status = zoo.status()
    assert status.joint_step == RECIPE.n_steps
    done = {c["task"] for c in Library.load(shipped / LIBRARY_FILE).cards if c["steps"] > 0}
    assert status.n_experts == len(done)
    lines = _run(zoo, base, stages=("experts",))
    assert not {line.split()[1].rstrip(":") for line in lines if "NLL" in line} & done


SHORT = replace(RECIPE, n_steps=2)


def test_a_restart_goes_on_from_nothing_that_was_shipped(
    base: Path, shipped: Path, tmp_path: Path
) -> None:
    _run(_zoo(tmp_path / "state", shipped, SHORT), base, stages=("joint",), restart=True)
    again = _zoo(tmp_path / "state", shipped, SHORT)
    _run(again, base, stages=("joint",))
    status = again.status()
    assert (status.joint_step, status.n_experts) == (SHORT.n_steps, 0)


def test_nothing_of_another_base_is_gone_on_from(base: Path, shipped: Path, tmp_path: Path) -> None:
    other = tiny_directory(tmp_path / "other", spread=0.2)
    library = tmp_path / "library"
    shutil.copytree(shipped, library)
    zoo = _zoo(tmp_path / "state", library, SHORT)
    with pytest.raises(NotTrained, match="no joint vectors"):
        _export(zoo, other)
    _run(zoo, other, stages=("joint",))
    assert (zoo.status().joint_step, zoo.status().n_experts) == (SHORT.n_steps, 0)
    for go_on in (_run, _export):
        with pytest.raises(GeneratorMismatch, match="--restart"):
            go_on(zoo, base)
    _run(zoo, base, stages=("joint",), restart=True)


def test_a_partial_library_says_what_is_missing(base: Path, tmp_path: Path) -> None:
    zoo = _zoo(tmp_path / "state", tmp_path / "shipped")
    _run(zoo, base, stages=("joint",))
    library = Library.load(_export(zoo, base))
    assert library.missing == SPLIT.sets["train"]
    assert all(card["steps"] == 0 for card in library.cards)


def _reader(base: Path) -> TaskVectors:
    return TaskVectors(lambda: (tiny_base(base), tiny_codec()))


def _generator(shipped: Path) -> Generator:
    def no_base() -> NoReturn:
        raise AssertionError("only ICM-LoRA looks at the base")

    return Generator(Bundle.load(shipped), HashedWords(), TaskVectors(no_base), "tiny")


def test_a_saved_bundle_is_the_bundle_that_was_trained(shipped: Path, base: Path) -> None:
    one, two = Bundle.load(shipped), Bundle.load(shipped)
    assert one.digest == two.digest
    generator, again = (Generator(b, HashedWords(), _reader(base), "tiny") for b in (one, two))
    for method in generator.methods:
        a = generator.generate("Write the past tense of the verb", method=method)
        b = again.generate("Write the past tense of the verb", method=method)
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_generated_adapter_says_where_it_came_from(shipped: Path) -> None:
    generator = _generator(shipped)
    made = generator.generate(Task.parse("plural/quotes").descriptions()[0], seed=3)
    assert made.config["peft_type"] == "LORA"
    assert made.card["method"] == "end-to-end"
    assert {"plural", "quotes"} <= set(made.card["parts"])  # type: ignore[call-overload]
    assert made.card["library"] == Library.load(shipped / LIBRARY_FILE).digest
    assert float(made.card["delta_norm"]) > 0  # type: ignore[arg-type]


def test_samples_depend_on_the_seed_alone(shipped: Path) -> None:
    generator = _generator(shipped)

    def vector(seed: int) -> torch.Tensor:
        text = "Give the plural form, quoted"
        return generator.generate(text, method="sg-lora", seed=seed, samples=2).vector

    assert torch.equal(vector(1), vector(1))
    assert not torch.equal(vector(1), vector(2))


def test_a_strange_description_is_refused_unless_forced(shipped: Path) -> None:
    generator = _generator(shipped)
    text = "zebras quietly juggle purple thunder"
    with pytest.raises(OutOfDistribution) as refusal:
        generator.generate(text)
    assert refusal.value.score > refusal.value.limit
    assert len(refusal.value.nearest) == 3
    assert generator.generate(text, force=True).tensors


def test_icm_lora_reads_prompts_and_says_how_many(shipped: Path, base: Path) -> None:
    generator = Generator(Bundle.load(shipped), HashedWords(), _reader(base), "tiny")
    text, task = "Give the plural form, quoted", Task.parse("plural/quotes")
    prompts = [example.prompt for example in task.examples("train", 16)]
    bare = generator.generate(text, method="icm-lora")
    told, other = (
        generator.generate(text, method="icm-lora", prompts=p) for p in (prompts[:8], prompts[8:])
    )
    assert [made.card["prompts"] for made in (bare, told, other)] == [0, 8, 8]
    assert len({float(made.vector.sum()) for made in (bare, told, other)}) == 3


def test_prompts_that_tell_nothing_are_refused(shipped: Path, base: Path) -> None:
    generator = Generator(Bundle.load(shipped), HashedWords(), _reader(base), "tiny")
    text = "Give the plural form, quoted"
    with pytest.raises(UnfitPrompts, match="at least 8 prompts, not 7"):
        generator.generate(text, method="icm-lora", prompts=["apple"] * 7)
    for method in ("auto", "sg-lora"):
        with pytest.raises(UnfitPrompts, match="no use for prompts"):
            generator.generate(text, method=method, prompts=["apple"] * 8)


def test_an_unknown_method_is_refused(shipped: Path) -> None:
    generator = _generator(shipped)
    with pytest.raises(NotTrained, match="end-to-end"):
        generator.generate("Give the plural form", method="magic")


def test_a_generator_of_another_library_is_refused(shipped: Path, tmp_path: Path) -> None:
    for file in shipped.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / JOINT_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / JOINT_FILE).write_bytes(data)
    with pytest.raises(GeneratorMismatch, match="joint"):
        Bundle.load(tmp_path)


def test_fitting_the_guard_anew_leaves_every_map_as_it_was(shipped: Path, tmp_path: Path) -> None:
    for file in shipped.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    known = Bundle.load(tmp_path).ood_score
    blunt = OodDetector(known.whiten * 0, known.operations, known.limit + 1)
    replace_guard(tmp_path, blunt)
    assert Bundle.load(tmp_path).ood_score.limit == blunt.limit
    refit_guard(tmp_path, HashedWords())
    trained, refitted = (read_tensor_file(f / GENERATOR_FILE) for f in (shipped, tmp_path))
    assert refitted.header == trained.header
    assert refitted.tensors.keys() == trained.tensors.keys()
    assert all(torch.equal(v, trained.tensors[k]) for k, v in refitted.tensors.items())
    assert Bundle.load(tmp_path).digest == Bundle.load(shipped).digest


def test_a_generator_of_an_unknown_format_gets_no_guard(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(NotTrained, match="generator train"):
        replace_guard(tmp_path, Bundle.load(shipped).ood_score)
    write_tensor_file(tmp_path / GENERATOR_FILE, {}, {"format": "loraplex-generator-2"})
    with pytest.raises(GeneratorMismatch, match="generator-2"):
        replace_guard(tmp_path, Bundle.load(shipped).ood_score)


def test_a_generator_for_another_base_is_refused(shipped: Path, tmp_path: Path) -> None:
    other = tiny_directory(tmp_path, spread=0.2)
    with pytest.raises(GeneratorMismatch, match=f"not {base_fingerprint(other)}"):
        Generator.load(shipped, HashedWords(), base_name="tiny", base_directory=other)


def test_without_files_the_error_names_the_commands(tmp_path: Path) -> None:
    with pytest.raises(NotTrained, match="loraplex zoo train"):
        Bundle.load(tmp_path)


@pytest.fixture(scope="module")
def with_map(shipped: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, and a text map over four of its tasks and two of its own."""
    folder = tmp_path_factory.mktemp("with_map")
    for file in shipped.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    train_text_map(
        base,
        HashedWords(),
        tiny_tokenizer(),
        replace(SPLIT, sets={"train": (*SPLIT.sets["train"][:4], *MAPPED)}),
        folder=folder / "state",
        shipped=folder,
        recipe=TextMapRecipe(n_steps=4, n_directions=8, tasks_per_step=2, tokens_per_task=40),
        report=lambda _: None,
        reading=ReaderRecipe(n_steps=200),
    )
    return folder


def test_auto_is_the_map_where_there_is_one(with_map: Path, shipped: Path) -> None:
    generator, without = _generator(with_map), _generator(shipped)
    for task in ("gerund/quotes", "plural/quotes"):
        made = generator.generate(Task.parse(task).descriptions()[0])
        assert made.card["method"] == "text-map"
        assert made.card["generator"] == TextMap.load(with_map / TEXT_MAP_FILE).digest
        assert made.card["parts"]["quotes"] > 0.8  # type: ignore[index]
    made = without.generate(Task.parse("plural/quotes").descriptions()[0])
    assert made.card["method"] == "end-to-end"


def test_setting_the_default_says_that_a_map_goes_first(
    with_map: Path, shipped: Path, tmp_path: Path
) -> None:
    for folder, has_map in ((with_map, True), (shipped, False)):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        order = ["default", "sg-lora", "--shipped", str(copy)]
        told = CliRunner().invoke(generator_command, order)
        assert told.exit_code == 0, told.output
        assert ("`auto` stays the text map" in told.output) == has_map
        assert _generator(copy).default_method == ("text-map" if has_map else "sg-lora")


@pytest.mark.parametrize("same", [True, False])
def test_another_run_trains_beside_the_map_of_the_same_tasks(
    with_map: Path, base: Path, tmp_path: Path, *, same: bool
) -> None:
    for file in with_map.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = TextMap.load(tmp_path / TEXT_MAP_FILE)
    assert not list((with_map / "state").iterdir())  # of a run that has ended
    lines: list[str] = []
    train_text_map(
        base,
        HashedWords(),
        tiny_tokenizer(),
        replace(SPLIT, sets={"train": (*SPLIT.sets["train"][:4], *MAPPED[: 1 + same])}),
        folder=tmp_path / "state",
        shipped=tmp_path,
        recipe=TextMapRecipe(n_steps=2, n_directions=3, tasks_per_step=2, tokens_per_task=40),
        report=lines.append,
        reading=ReaderRecipe(n_steps=20),
    )
    after = TextMap.load(tmp_path / TEXT_MAP_FILE)
    if same:
        kept = after.rows[: len(before.rows)]
        torch.testing.assert_close(kept, before.rows, atol=1e-3, rtol=0)  # tiny scales are coarse
        assert len(after.rows) > len(before.rows)
    else:
        assert "begins with the joint vectors" in lines[0]
        assert len(after.rows) <= len(after.dressings.names) + 3


def test_without_a_text_map_there_is_no_such_method(shipped: Path) -> None:
    generator = _generator(shipped)
    assert "text-map" not in generator.methods
    with pytest.raises(NotTrained, match="generator text-map"):
        generator.generate("Give the plural form", method="text-map")


def test_a_text_map_refuses_by_a_limit_of_its_own(with_map: Path, tmp_path: Path) -> None:
    for file in with_map.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    known = TextMap.load(tmp_path / TEXT_MAP_FILE)
    replace(known, reader=replace(known.reader, limit=0.5)).save(tmp_path)
    text = "zebras quietly juggle purple thunder"
    with pytest.raises(OutOfDistribution) as refusal:
        _generator(tmp_path).generate(text, method="text-map")
    assert refusal.value.limit == 0.5
    score = float(known.reader.scores(HashedWords().encode([text])))
    assert refusal.value.score == pytest.approx(score, abs=1e-2)
    assert len(refusal.value.nearest) == 3


def test_a_text_map_for_another_base_is_refused(with_map: Path, tmp_path: Path) -> None:
    for file in with_map.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = TextMap.load(tmp_path / TEXT_MAP_FILE)
    replace(other, base_fingerprint="0123").save(tmp_path)
    with pytest.raises(GeneratorMismatch, match="0123"):
        Bundle.load(tmp_path)


def test_the_evaluation_scores_every_arm_on_every_task(
    trained: ZooTraining, shipped: Path, base: Path, tmp_path: Path
) -> None:
    result = evaluate(
        shipped,
        tiny_base(base),
        TaskData(tiny_codec()),
        HashedWords(),
        split=SPLIT,
        sets=("h1",),
        oracles={name: e.mean for name, e in trained.oracles().items()},
        multi_task=trained.multi_task(),
        n_rows=4,
        n_seeds=2,
        sg=replace(SgRecipe(), n_steps=10),
        icm=IcmRecipe(n_steps=4, batch=4, latent=8, channels=(4, 4, 4)),
        raw_weights=RawWeightRecipes(
            replace(SG_ON_RAW_WEIGHTS, n_steps=3, batch=4),
            replace(ICM_ON_RAW_WEIGHTS, n_steps=2, batch=2),
        ),
    )
    for arm in (
        "base",
        "weighted",
        "arrow",
        "sg-lora #1",
        "sg-lora on raw weights",
        "icm-lora #1",
        "icm-lora + prompts #0",
        "icm-lora on raw weights",
        "multi-task + description",
        "best expert by test score",
        GUARDED,
        "oracle",
    ):
        assert set(result.scores[arm]) == {"past/caps", "plural/quotes"}
    assert all(score["rho"] == 0 for score in result.scores["base"].values())
    assert all(score["rho"] == 1 for score in result.scores["oracle"].values())
    assert best_method(result, ("end-to-end", "uniform")) in ("end-to-end", "uniform")
    write_evidence(result, tmp_path, "test")
    text = (tmp_path / "test.md").read_text()
    assert "`past/caps`" in text
    assert "95 % interval" in text


class _StopError(Exception):
    pass


def _stop_after(zoo: ZooTraining, base: Path, *, n_lines: int) -> None:
    """Kills the run at its n-th report, with checkpoints taken at every step."""
    seen: list[str] = []

    def report(line: str) -> None:
        seen.append(line)
        if len(seen) >= n_lines:
            raise _StopError

    with pytest.raises(_StopError):
        zoo.run(
            base,
            HashedWords(),
            tiny_tokenizer(),
            report=report,
            stages=("joint",),
            checkpoint_every_s=0.0,
        )
