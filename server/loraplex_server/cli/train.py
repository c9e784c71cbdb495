"""`loraplex train`: an adapter from chat examples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplex_training.config import FAMILIES, IMAGE_FAMILIES, RECIPES
from loraplex_training.images.config import BLOCK_LORA, TEMPLATE, ImageShape, ImageTraining

from .failed import failed
from .option_groups import flag, grouped
from .train_classes import train_classes

if TYPE_CHECKING:
    from loraplex_training.config import AdapterShape, Schedule
    from loraplex_training.run import StepReport, TrainedAdapter


@dataclass(frozen=True)
class _ShapeOptions:
    family: str = flag(
        "lora",
        f"The family: {', '.join(FAMILIES)}. For a folder of images: {', '.join(IMAGE_FAMILIES)}.",
    )
    recipe: str = flag("lora", f"The recipe of family lora: lora, {', '.join(sorted(RECIPES))}.")
    rank: int | None = flag(
        None, "The rank of the factors. Default: 8; for images 2, and 8 for block-lora.", min=1
    )
    alpha: float | None = flag(
        None,
        "The update is scaled by alpha / rank, for images by alpha / sqrt(rank). Default: "
        "2 · rank; for images 1.",
    )
    targets: str | None = flag(
        None,
        "The modules, separated by commas (q_proj,v_proj), or all-linear. Default: all-linear; "
        "for images q_proj,k_proj,v_proj.",
    )
    layers: str | None = flag(None, "The layers, such as 8-29 or 0,4,8. Default: all.")
    rslora: bool = flag(False, "Scale the update by alpha / sqrt(rank).", "--rslora")
    dropout: float | None = flag(
        None, "Dropout on the adapter's input. Default: 0; for images 0.25."
    )
    dtype: str = flag("float16", "The dtype of the saved tensors: float16, bfloat16 or float32.")


@dataclass(frozen=True)
class _FamilyOptions:
    experts: int = flag(8, "Number of experts of each MLP, for mixlora.", min=1)
    top_k: int = flag(2, "Number of experts of each token, for mixlora.", min=1)
    balance: str = flag(
        "pooled", "Balance loss of mixlora: pooled (the public code), argmax (the paper) or none."
    )
    balance_coefficient: float | None = flag(
        None, "Weight of mixlora's balance loss. Default: 0.001 for pooled, 0.01 for argmax."
    )
    blocks: int = flag(4, "Number of blocks of a factor, for block-lora.", min=1)
    block_axis: str = flag("rank", "Axis that block-lora cuts: rank or feature.")
    virtual_tokens: int = flag(16, "Number of virtual tokens, for prefix.", min=1)


@dataclass(frozen=True)
class _ScheduleOptions:
    steps: int = flag(300, "The number of optimiser steps.", min=1)
    lr: float = flag(1e-3, "Peak learning rate, which falls by a cosine to a tenth of it.")
    batch_tokens: int = flag(1024, "Most tokens of a step, padding included.", min=1)
    validate_every: int = flag(50, "Steps between validations.", min=1)
    patience: int | None = flag(None, "Stop after this number of validations without improvement.")
    seed: int = flag(0, "The seed of the initial weights and of the order of examples.")


@dataclass(frozen=True)
class _DataOptions:
    val: str = flag(
        "0.05",
        "Validation data: a JSONL file, or a share of the data (0: no validation). For images, a "
        "folder like DATA; without it, none.",
    )
    max_len: int = flag(
        512, "Largest number of tokens of an example. Longer examples are refused.", min=2
    )
    start: Path | None = flag(
        None, "Start from the weights of this adapter, which must have the same shape."
    )


@dataclass(frozen=True)
class _ImageOptions:
    template: str = flag(TEMPLATE, "The text of a class of images. {} is its label.")
    batch_images: int = flag(32, "Number of images of a step.", min=1)


@dataclass(frozen=True)
class _RunOptions:
    device: str = flag("auto", "The device: auto, cpu, cuda, cuda:1 ...")
    threads: int | None = flag(None, "The number of CPU threads.", min=1)
    recompute_layers: bool = flag(
        False,
        "Gradient checkpointing: compute each layer twice, with less memory and more time.",
        "--recompute-layers",
    )
    name: str | None = flag(None, "The name on the card. Default: the folder's name.")
    description: str | None = flag(None, "A sentence on the card that says what the adapter does.")
    restart: bool = flag(False, "Discard an interrupted run in --out.", "--restart")
    overwrite: bool = flag(False, "Replace a finished adapter in --out.", "--overwrite")


@grouped
def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help='A file with a chat on each line: {"messages": [{"role": "user", "content": '
            '"..."}, {"role": "assistant", "content": "..."}]}. Or, for a CLIP, a folder with a '
            "folder of images for each label.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder of the adapter.", show_default=False)
    ],
    shape: _ShapeOptions,
    of_family: _FamilyOptions,
    schedule: _ScheduleOptions,
    examples: _DataOptions,
    images: _ImageOptions,
    run: _RunOptions,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base: a pulled name, a Hub id or a directory. Default: the default base."
        ),
    ] = None,
) -> None:
    """Train an adapter on chat examples and save it as a PEFT directory.

    Only the assistant's turns are learnt. Ctrl-C stops the run, and the same command resumes it,
    with the result of an uninterrupted run. With validation, the weights of the best validation
    are saved.

        loraplex train support.jsonl --out adapters/support --rank 8 --steps 300

    On a CLIP, a few images of each label are learnt:

        loraplex train pets --out adapters/pets --base models/clip --family clip-lora
    """
    from loraplex_server.model.loading.pull import public_name, resolve_model
    from loraplex_training.config import TrainingConfig
    from loraplex_training.trainer import train as train_adapter

    with _errors():
        directory = resolve_model(base)
        base_name = public_name(base, directory)
        if data.is_dir():
            _refuse(
                "is for chats, and DATA is a folder of images",
                *(shape, of_family, schedule, examples, run),
            )
            validation = None if examples.val == _DataOptions().val else Path(examples.val)
            train_classes(
                ImageTraining(
                    data=data,
                    out=out,
                    base=directory,
                    base_name=base_name,
                    shape=_image_shape(shape, of_family),
                    validation=validation,
                    template=images.template,
                    steps=schedule.steps,
                    lr=schedule.lr,
                    batch_images=images.batch_images,
                    seed=schedule.seed,
                    device=run.device,
                    threads=run.threads,
                    name=run.name,
                    description=run.description,
                ),
                overwrite=run.overwrite,
            )
            return
        _refuse("is for images, and DATA is a file of chats", images)
        with _bar(str(out)) as on_step:
            config = TrainingConfig(
                data=data,
                out=out,
                base=directory,
                base_name=base_name,
                shape=_shape(shape, of_family),
                schedule=_schedule(schedule),
                start=examples.start,
                validation=_validation(examples.val),
                max_len=examples.max_len,
                device=run.device,
                threads=run.threads,
                gradient_checkpointing=run.recompute_layers,
                name=run.name,
                description=run.description,
            )
            trained = train_adapter(
                config, on_step=on_step, restart=run.restart, overwrite=run.overwrite
            )
    _show(trained)
    typer.echo(f"serve it: loraplex adapters add {run.name or out.resolve().name} {out}")


_OF_BOTH = {  # the options that chats and images have
    *("family", "rank", "alpha", "targets", "dropout", "dtype", "blocks", "block_axis"),
    *("steps", "lr", "seed", "val", "device", "threads", "name", "description", "overwrite"),
}


def _refuse(message: str, *groups: Any) -> None:
    """Raises TrainingError for an option of ``groups`` that was given and is not of both kinds."""
    from dataclasses import fields

    from loraplex_training.errors import TrainingError

    for group in groups:
        for option in fields(group):
            if option.name not in _OF_BOTH and getattr(group, option.name) != option.default:
                raise TrainingError(f"--{option.name.replace('_', '-')} {message}; leave it out")


def _image_shape(shape: _ShapeOptions, family: _FamilyOptions) -> ImageShape:
    from loraplex_training.config import BlockShape

    default = ImageShape()
    has_blocks = shape.family == BLOCK_LORA
    return ImageShape(
        family=shape.family,
        rank=(8 if has_blocks else default.rank) if shape.rank is None else shape.rank,
        alpha=default.alpha if shape.alpha is None else shape.alpha,
        targets=default.targets if shape.targets is None else _names(shape.targets),
        dropout=default.dropout if shape.dropout is None else shape.dropout,
        blocks=BlockShape(family.blocks, family.block_axis) if has_blocks else None,
        stored_dtype=shape.dtype,
    )


def _shape(shape: _ShapeOptions, family: _FamilyOptions) -> AdapterShape:
    from loraplex_training.config import AdapterShape, BlockShape, ExpertShape, PrefixShape

    experts = blocks = prefix = None
    if shape.family == "mixlora":
        experts = ExpertShape(
            family.experts, family.top_k, family.balance, family.balance_coefficient
        )
    elif shape.family == "block-lora":
        blocks = BlockShape(family.blocks, family.block_axis)
    elif shape.family == "prefix":
        prefix = PrefixShape(family.virtual_tokens)
    rank = 8 if shape.rank is None else shape.rank
    return AdapterShape(
        family=shape.family,
        recipe=shape.recipe,
        rank=rank,
        alpha=2.0 * rank if shape.alpha is None else shape.alpha,
        targets=_names(shape.targets or "all-linear"),
        layers=None if shape.layers is None else _layers(shape.layers),
        rslora=shape.rslora,
        dropout=shape.dropout or 0.0,
        stored_dtype=shape.dtype,
        experts=experts,
        blocks=blocks,
        prefix=prefix,
    )


def _names(targets: str) -> tuple[str, ...]:
    return tuple(target.strip() for target in targets.split(","))


def _schedule(options: _ScheduleOptions) -> Schedule:
    from dataclasses import asdict

    from loraplex_training.config import Schedule

    return Schedule(**asdict(options))


def _show(trained: TrainedAdapter) -> None:
    done = trained.progress
    typer.echo(
        f"{trained.folder}: {trained.n_parameters:,} parameters, {trained.n_bytes / 1e6:.2f} MB, "
        f"{done.step} steps, {done.n_tokens:,} tokens in {done.seconds:.0f} s"
    )
    if trained.validation_loss is not None:
        alone = trained.base_validation_loss
        typer.echo(
            f"validation loss {trained.validation_loss:.4f} (step {done.best_step})"
            + ("" if alone is None else f"; the base alone: {alone:.4f}")
        )


def _layers(spec: str) -> list[int]:
    layers: list[int] = []
    try:
        for part in spec.split(","):
            first, _, last = part.partition("-")
            layers.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        raise typer.BadParameter(f"--layers is {spec!r}; write 8-29 or 0,4,8") from None
    return layers


def _validation(spec: str) -> Path | float:
    try:
        share = float(spec)
    except ValueError:
        return Path(spec)
    if not 0.0 <= share < 1.0:
        raise typer.BadParameter(f"--val is {spec}; a share must be in [0, 1)")
    return share


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print an error as one line. After Ctrl-C, say how to resume."""
    from loraplex_server.model.errors import ModelError
    from loraplex_training.errors import TrainingError

    try:
        yield
    except (TrainingError, ModelError, ValueError) as error:
        raise failed(error) from None
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command resumes the run", fg="yellow", err=True)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[StepReport], None]]:
    """Show a progress bar on a terminal, and elsewhere a line for each tenth of the run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        TextColumn("{task.fields[losses]}"),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(title, total=None, losses="loading")

    def on_step(report: StepReport) -> None:
        losses = f"loss {report.train_loss:.3f}" if report.train_loss is not None else ""
        if report.validation_loss is not None:
            losses += f"  validation {report.validation_loss:.3f}"
        losses += f"  {report.tokens_per_s:.0f} tok/s"
        bar.update(task, total=report.steps, completed=report.step, losses=losses)
        if not console.is_terminal and report.step % max(1, report.steps // 10) == 0:
            typer.echo(f"{title}: step {report.step}/{report.steps}  {losses}", err=True)

    with bar:
        yield on_step
