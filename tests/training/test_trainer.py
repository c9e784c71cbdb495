"""Training on a tiny model: it learns, it can be stopped anywhere, and PEFT reads what it wrote."""

import hashlib
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, LlamaModel
from typer.testing import CliRunner

from loraplex_server.cli.app import app
from loraplex_training.config import AdapterShape, ExpertShape, Schedule, TrainingConfig
from loraplex_training.errors import CheckpointError, TrainingError
from loraplex_training.run import StepReport, TrainedAdapter
from loraplex_training.trainer import train
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, also in tests that a shell runs in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with one and the same answer: anything that trains learns this."""
    path = tmp_path_factory.mktemp("data") / "echo.jsonl"
    lines = []
    for i in range(60):
        question = {"role": "user", "content": "one base " * (i % 4) + str(i)}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "AB"}]}))
    path.write_text("\n".join(lines))
    return path


def config_of(tiny_base: Path, data: Path, folder: Path) -> TrainingConfig:
    return TrainingConfig(
        data=data,
        out=folder / "echo",
        base=tiny_base,
        base_name="tiny",
        shape=AdapterShape(rank=4, alpha=8.0, targets=("q_proj", "down_proj"), dropout=0.1),
        schedule=Schedule(steps=24, lr=2e-2, warmup_steps=2, batch_tokens=256, validate_every=6),
        validation=0.1,
        description="Says AB.",
        prompts=("one base 7",),
    )


@pytest.fixture
def config(tiny_base: Path, data: Path, tmp_path: Path) -> TrainingConfig:
    return config_of(tiny_base, data, tmp_path)


@pytest.fixture(scope="module")
def trained(
    tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainedAdapter:
    """What `config` gives without an interruption. Tests only read its folder."""
    return train(config_of(tiny_base, data, tmp_path_factory.mktemp("trained")))


class Stop:
    """Interrupts a run after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, report: StepReport) -> None:
        if report.step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_training_lowers_the_validation_loss_and_writes_what_peft_reads(
    trained: TrainedAdapter, tiny_base: Path
) -> None:
    assert trained.validation_loss is not None
    assert trained.base_validation_loss is not None
    assert trained.validation_loss < 0.8 * trained.base_validation_loss
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
    ]
    written = json.loads((trained.folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "tiny"
    assert (written["r"], written["lora_alpha"]) == (4, 8.0)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), trained.folder
    )
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one base 7"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
    )
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer.startswith("AB")


def test_the_card_tells_how_the_adapter_was_made(trained: TrainedAdapter) -> None:
    card = json.loads((trained.folder / "card.json").read_text())
    assert card["name"] == "echo"
    assert card["description"] == "Says AB."
    assert card["examples"] == ["one base 7"]
    assert card["training"]["steps_done"] == 24
    assert card["training"]["n_examples"] == 54
    assert card["training"]["shape"]["rank"] == 4


@pytest.mark.parametrize(
    "step", [7, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 18, 23))]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    config: TrainingConfig, trained: TrainedAdapter, tmp_path: Path, step: int
) -> None:
    again = replace(config, out=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        train(again, on_step=Stop(step))
    assert not (again.out / "adapter_config.json").exists()
    first: list[StepReport] = []
    train(again, on_step=first.append)
    assert first[0].step == step + 1
    whole = load_file(trained.folder / "adapter_model.safetensors")
    resumed = load_file(again.out / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("recipe", ["lora-ga", pytest.param("sora", marks=pytest.mark.nightly)])
def test_an_interrupted_run_of_a_recipe_goes_on_to_the_same_bits(
    config: TrainingConfig, tmp_path: Path, recipe: str
) -> None:
    shape = replace(config.shape, recipe=recipe, dropout=0.0)
    config = replace(config, shape=shape, schedule=replace(config.schedule, steps=12))
    trained = train(config)
    assert trained.validation_loss is not None
    assert trained.base_validation_loss is not None
    assert trained.validation_loss < trained.base_validation_loss
    again = replace(config, out=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        train(again, on_step=Stop(7))
    train(again)
    whole, resumed = (load_file(c.out / "adapter_model.safetensors") for c in (config, again))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_recipes_refuse_what_they_do_not_train(config: TrainingConfig) -> None:
    with pytest.raises(ValueError, match="recipe is 'magic'; choose lora, allora"):
        replace(config.shape, recipe="magic")
    with pytest.raises(ValueError, match="leave out family, dropout and layers"):
        replace(config.shape, recipe="sora")


@pytest.mark.parametrize(
    ("where", "n_signals"),
    [("step", 1), ("validation", 2)]
    + [pytest.param(*case, marks=pytest.mark.nightly) for case in (("step", 2), ("validation", 1))],
)
def test_ctrl_c_within_a_step_or_a_validation_changes_no_bit(
    config: TrainingConfig, trained: TrainedAdapter, tmp_path: Path, where: str, n_signals: int
) -> None:
    again = replace(config, out=tmp_path / "again")
    steps = 0  # forwards with a gradient
    signals = iter([signal.SIGINT] * n_signals)

    def called(module: torch.nn.Module, *_: object) -> None:
        nonlocal steps
        if not isinstance(module, LlamaModel):
            return
        steps += torch.is_grad_enabled()
        if torch.is_grad_enabled() == (where == "step"):
            interrupt()

    def interrupt() -> None:
        for each in signals if steps == config.schedule.steps else ():
            signal.raise_signal(each)

    with register_module_forward_pre_hook(called), pytest.raises(KeyboardInterrupt):
        train(again)
    assert (again.out / ".training" / "checkpoint.safetensors").exists() == (n_signals == 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(again)
    whole, resumed = (
        load_file(out / "adapter_model.safetensors") for out in (trained.folder, again.out)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_other_settings_is_refused_and_restart_forgets_it(
    config: TrainingConfig,
) -> None:
    config = replace(config, schedule=replace(config.schedule, steps=6))
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=Stop(3))
    other = replace(config, schedule=replace(config.schedule, lr=1e-3))
    with pytest.raises(CheckpointError, match="--restart"):
        train(other)
    assert train(other, restart=True).progress.step == 6


def test_a_finished_adapter_is_not_overwritten_by_accident(config: TrainingConfig) -> None:
    short = replace(config, schedule=replace(config.schedule, steps=2))
    train(short)
    with pytest.raises(CheckpointError, match="--overwrite"):
        train(short)
    train(short, overwrite=True)


def test_the_best_weights_are_kept_and_patience_stops_early(config: TrainingConfig) -> None:
    wild = replace(
        config,
        schedule=replace(config.schedule, steps=200, lr=0.5, validate_every=2, patience=3),
    )
    stopped = train(wild)
    assert stopped.progress.step < 200
    assert stopped.progress.best_step == stopped.progress.step - 6


@pytest.mark.parametrize("family", ["lora", pytest.param("block-lora", marks=pytest.mark.nightly)])
def test_a_run_goes_on_from_another_adapter(
    config: TrainingConfig, tmp_path: Path, family: str
) -> None:
    shape = replace(config.shape, family=family, dropout=0.0, stored_dtype="float32")
    config = replace(config, schedule=replace(config.schedule, steps=6, validate_every=3))
    first = train(replace(config, shape=shape))
    losses: list[float | None] = []
    second = replace(config, shape=shape, out=tmp_path / "second", start=first.folder)
    trained = train(second, on_step=lambda report: losses.append(report.validation_loss))
    assert losses[0] == pytest.approx(first.validation_loss)  # nothing is lost on the way
    assert trained.base_validation_loss is None
    told = json.loads((second.out / "card.json").read_text())["training"]
    weights = (first.folder / "adapter_model.safetensors").read_bytes()
    assert told["start_sha256"] == hashlib.sha256(weights).hexdigest()
    before = json.loads((first.folder / "card.json").read_text())["training"]
    assert told["before"] == before
    assert told["start_validation_loss"] == pytest.approx(first.validation_loss, abs=1e-4)


def test_an_adapter_of_another_shape_is_no_start(
    config: TrainingConfig, trained: TrainedAdapter, tmp_path: Path
) -> None:
    other = replace(config, out=tmp_path / "other", start=trained.folder)
    with pytest.raises(TrainingError, match="another shape"):
        train(replace(other, shape=replace(config.shape, targets=("q_proj",))))
    with pytest.raises(TrainingError, match="cannot start from"):
        train(replace(other, start=tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("begun", "goes_on", "told"),
    [
        ({}, {"rank": 2}, "its r is 4, that of this run 2; give --rank 4"),
        ({}, {"alpha": 4.0}, "its lora_alpha is 8.0, that of this run 4.0; give --alpha 8.0"),
        ({}, {"rslora": True}, "its use_rslora is False, that of this run True; give no --rslora"),
        ({"rslora": True}, {"rslora": False}, "use_rslora is True, .* False; give --rslora$"),
        (
            {"family": "mixlora", "targets": ("all-linear",), "experts": ExpertShape(3, 1)},
            {"experts": ExpertShape(3, 2)},
            "its top_k is 1, that of this run 2; give --top-k 1",
        ),
        (
            {},
            {"family": "block-lora"},
            "its peft_type is LORA, that of this run BLOCK_LORA; give its --family",
        ),
    ],
)
def test_an_adapter_of_another_scale_or_routing_is_no_start(
    config: TrainingConfig,
    tmp_path: Path,
    begun: dict[str, Any],
    goes_on: dict[str, Any],
    told: str,
) -> None:
    shape = replace(config.shape, **begun)
    short = replace(config, shape=shape, schedule=replace(config.schedule, steps=1))
    first = train(short)
    second = replace(short, shape=replace(shape, **goes_on), out=tmp_path / "second")
    with pytest.raises(TrainingError, match=told):
        train(replace(second, start=first.folder))


def test_a_checkpoint_of_a_run_from_elsewhere_is_refused(
    config: TrainingConfig, trained: TrainedAdapter
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=Stop(3))
    with pytest.raises(CheckpointError):
        train(replace(config, start=trained.folder))


def test_a_target_that_the_model_lacks_is_named(config: TrainingConfig) -> None:
    with pytest.raises(TrainingError, match="nothing_proj"):
        train(replace(config, shape=replace(config.shape, targets=("nothing_proj",))))


def test_the_command_trains_and_says_what_came_out(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "by-command"
    arguments = ["train", str(data), "--out", str(out), "--base", str(tiny_base)]
    arguments += ["--rank", "2", "--targets", "q_proj", "--layers", "1-2", "--steps", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "4 steps" in result.output
    assert "validation loss" in result.output
    layers = {name.split(".layers.")[1][0] for name in load_file(out / "adapter_model.safetensors")}
    assert layers == {"1", "2"}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--overwrite" in again.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--layers", "a-b"], "write 8-29 or 0,4,8"),
        (["--val", "2"], "a share must be in"),
        (["--dropout", "1.5"], "must be in [0, 1)"),
        (["--dtype", "int8"], "choose float16"),
        (["--base", "nobody/nothing"], "loraplex pull nobody/nothing"),
    ],
)
def test_a_bad_option_is_one_clear_line(
    data: Path, tmp_path: Path, tiny_base: Path, arguments: list[str], problem: str
) -> None:
    if "--base" not in arguments:
        arguments = [*arguments, "--base", str(tiny_base)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["train", str(data), "--out", str(tmp_path / "x"), *arguments]
    )
    assert result.exit_code != 0
    assert problem in result.output
    assert "Traceback" not in result.output
