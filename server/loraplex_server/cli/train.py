"""`loraplex train` and `loraplex train-demos`: adapters from chat examples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loraplex_training.trainer import StepReport

__all__ = ["train", "train_demos"]


def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl",
            help='One chat a line: {"messages": [{"role": "user", "content": "..."}, '
            '{"role": "assistant", "content": "..."}]}.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the adapter.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Base model: a pulled name, Hub id or directory. Default: the default."),
    ] = None,
    family: Annotated[str, typer.Option(help="lora, mixlora or block-lora.")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of the factors.", min=1)] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="Scale of the update is alpha / rank. Default: 2 · rank.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Modules, with commas (q_proj,v_proj), or all-linear.")
    ] = "all-linear",
    layers: Annotated[
        str | None, typer.Option(help="Layers, as 8-29 or 0,4,8. Default: all.")
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) instead.")
    ] = False,
    dropout: Annotated[float, typer.Option(help="On the input of the adapter.")] = 0.0,
    experts: Annotated[int, typer.Option(help="mixlora: experts of each MLP.", min=1)] = 8,
    top_k: Annotated[int, typer.Option(help="mixlora: experts of each token.", min=1)] = 2,
    balance: Annotated[
        str,
        typer.Option(help="mixlora: balance loss: pooled (as the code), argmax (the paper), none."),
    ] = "pooled",
    balance_coefficient: Annotated[
        float | None,
        typer.Option(help="mixlora: of the balance loss. Default: 0.001 pooled, 0.01 argmax."),
    ] = None,
    blocks: Annotated[int, typer.Option(help="block-lora: blocks of a factor.", min=1)] = 4,
    block_axis: Annotated[str, typer.Option(help="block-lora: rank or feature.")] = "rank",
    start: Annotated[
        Path | None,
        typer.Option(help="Go on from the weights of this adapter, of the same shape."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 300,
    lr: Annotated[float, typer.Option(help="Peak learning rate; cosine to a tenth.")] = 1e-3,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a step, padding included.", min=1)
    ] = 1024,
    val: Annotated[
        str, typer.Option(help="Validation: a JSONL, or a share of the data held out (0: none).")
    ] = "0.05",
    validate_every: Annotated[int, typer.Option(help="Steps between validations.", min=1)] = 50,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a better one.")
    ] = None,
    max_len: Annotated[int, typer.Option(help="Longest example, in tokens.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the saved tensors: float16, bfloat16, float32.")
    ] = "float16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="For the card. Default: of the folder.")] = None,
    description: Annotated[str | None, typer.Option(help="For the card: what it does.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an interrupted run in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished adapter in --out.")
    ] = False,
) -> None:
    """Train an adapter on chat examples and save it as a PEFT directory.

    Only what the assistant says is learnt. Stop it at any time (Ctrl-C): the same command goes on
    where it was, with the result of an uninterrupted run. With validation, the weights of the best
    validation are saved.

        loraplex train support.jsonl --out adapters/support --rank 8 --steps 300
    """
    from loraplex_training.config import (
        AdapterShape,
        BlockShape,
        ExpertShape,
        Schedule,
        TrainingConfig,
    )
    from loraplex_training.trainer import train as train_adapter

    with _errors(), _bar(str(out)) as on_step:
        directory, base_name = _base(base)
        config = TrainingConfig(
            data=data,
            out=out,
            base=directory,
            base_name=base_name,
            shape=AdapterShape(
                family=family,
                rank=rank,
                alpha=2.0 * rank if alpha is None else alpha,
                targets=tuple(target.strip() for target in targets.split(",")),
                layers=None if layers is None else _layers(layers),
                rslora=rslora,
                dropout=dropout,
                stored_dtype=dtype,
                experts=ExpertShape(experts, top_k, balance, balance_coefficient)
                if family == "mixlora"
                else None,
                blocks=BlockShape(blocks, block_axis) if family == "block-lora" else None,
            ),
            schedule=Schedule(
                steps=steps,
                lr=lr,
                batch_tokens=batch_tokens,
                validate_every=validate_every,
                patience=patience,
                seed=seed,
            ),
            start=start,
            validation=_validation(val),
            max_len=max_len,
            device=device,
            threads=threads,
            name=name,
            description=description,
        )
        trained = train_adapter(config, on_step=on_step, restart=restart, overwrite=overwrite)
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
    typer.echo(f"serve it: loraplex adapters add {name or out.resolve().name} {out}")


def train_demos(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Default: all that ship with the server, but for chores and clock-12h, which "
            "learnt tasks of the zoo.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A folder per demo is written here.")
    ] = Path("demos"),
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Train demo adapters anew: generate data, train, measure on held-out prompts.

    Demos that --out holds already are skipped; an interrupted one goes on where it was.
    """
    import torch

    from loraplex_server.model.pull import loraplex_home
    from loraplex_training.demos import DEMOS
    from loraplex_training.demos.make import is_made, make_demo

    unknown = [name for name in names or () if name not in DEMOS]
    if unknown:
        raise typer.BadParameter(f"no demo {', '.join(unknown)}; choose {', '.join(DEMOS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    for name in names or DEMOS:
        folder = out / name
        if is_made(folder):
            typer.echo(f"{name}: in {folder} already")
            continue
        with _errors(), _bar(name) as on_step:
            directory, base_name = _base(None)
            measured = make_demo(
                DEMOS[name],
                folder,
                base=directory,
                base_name=base_name,
                work=loraplex_home() / "demo-data",
                on_step=on_step,
            )
        typer.echo(
            f"{name}: {measured.adapter:.0%} of {measured.n_prompts} held-out prompts "
            f"(base {measured.base:.0%})"
        )


def _base(spec: str | None) -> tuple[Path, str]:
    """The directory of the base, and the name that is written into the adapter."""
    from loraplex_server.model.pull import DEFAULT_BASE, resolve_model

    directory = resolve_model(spec)
    if spec is None:
        return directory, DEFAULT_BASE
    return directory, directory.name if Path(spec).expanduser().is_dir() else spec


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
    """One clear line instead of a traceback; Ctrl-C says how to go on."""
    from loraplex_server.model.errors import ModelError
    from loraplex_training.errors import TrainingError

    try:
        yield
    except (TrainingError, ModelError, ValueError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command goes on from here", fg="yellow", err=True)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[StepReport], None]]:
    """A progress bar on a terminal, a line every tenth of the run elsewhere."""
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
