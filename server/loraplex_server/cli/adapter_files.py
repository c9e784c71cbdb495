"""`loraplex adapters convert` and `inspect`: adapter files on this machine, without a server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from loraplex_adapter_store.base_spec import BaseSpec
    from loraplex_adapter_store.fold.reader import Reading
    from loraplex_adapter_store.fold.spectrum import ModuleInspection


def convert(
    source: Annotated[
        Path, typer.Argument(help="Folder with an adapter, or with its pickle (.bin, .pt).")
    ],
    out: Annotated[Path, typer.Argument(help="New folder that is written.")],
    initial: Annotated[
        Path | None,
        typer.Option(
            help="The adapter as it was saved before training. PiSSA, LoRA-GA and CorDA need it."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="The initialisation that rewrote the base in training, pissa or olora, if the "
            "file was saved as a plain LoRA and the adapter from before training is lost."
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Write this number of draws from the posterior of an ABMLL adapter.", min=1
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the posterior draws.")] = 0,
) -> None:
    """Turn a pickle into safetensors in a locked-down process, or add what training subtracted."""
    from loraplex_adapter_store.contents.convert import convert_directory, draw_posterior
    from loraplex_adapter_store.limits import StoreLimits

    from .server_client import errors_in_red

    with errors_in_red():
        if draws is not None:
            for folder in draw_posterior(source, out, draws, seed, StoreLimits()):
                typer.echo(f"wrote {folder}")
            return
        converted = convert_directory(source, out, StoreLimits(), initial=initial, init=init)
    for step in converted.steps:
        typer.echo(step)
    for name in converted.dropped:
        typer.echo(f"dropped {name}: not a tensor")
    typer.echo(f"wrote {out} ({len(converted.tensors)} tensors)")


def inspect(
    source: Annotated[
        Path, typer.Argument(help="Folder of an adapter, or the name of one that a server has.")
    ],
    intruders: Annotated[
        bool,
        typer.Option("--intruders", help="Count intruder dimensions: one SVD per module."),
    ] = False,
    k: Annotated[
        int, typer.Option(help="Number of top singular vectors that are compared.", min=1)
    ] = 10,
    epsilon: Annotated[
        float, typer.Option(help="A vector whose largest cosine is below this is an intruder.")
    ] = 0.5,
    model: Annotated[
        str | None, typer.Option(help="Base model of the adapter. Default: the default base.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="URL of the server that is asked for a name. Default: the server that runs on "
            "this machine.",
            envvar="LORAPLEX_URL",
        ),
    ] = None,
) -> None:
    """Show what an adapter changes in each module: ranks, norms, spectra, intruder dimensions.

    A name that is no folder is asked of the running server, as `loraplex adapters show` does.
    """
    if not source.is_dir():
        from .adapter_card import show_card

        show_card(str(source), url, os.environ.get("LORAPLEX_API_KEY"), as_json=as_json)
        return
    from loraplex_adapter_store.fold.spectrum import inspect_plan

    from .server_client import errors_in_red

    with errors_in_red():
        base = _load_base(model)
        reading = _read(source, base)
        modules = inspect_plan(reading.plan, base, intruders=intruders, k=k, epsilon=epsilon)
    report = reading.report.to_json()
    if as_json:
        rows = [module.to_json() for module in modules]
        typer.echo(json.dumps({"report": report, "modules": rows}, indent=2))
        return
    _print_inspection(report, modules)


def _load_base(model: str | None) -> BaseSpec:
    """Load the base model, whose weights the adapter is compared with. Raises ModelError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from loraplex_adapter_store.base_spec import BaseSpec
    from loraplex_server.model.loading.pull import resolve_model

    logging.disable_progress_bar()
    path = resolve_model(model)
    base = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    return BaseSpec.of(base, model or path.name)


def _read(folder: Path, base: BaseSpec) -> Reading:
    """Read the adapter of a folder. Raises StoreError."""
    from loraplex_adapter_store.files.adapter_config import AdapterConfig
    from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile
    from loraplex_adapter_store.fold.reader import read_adapter
    from loraplex_adapter_store.limits import StoreLimits
    from loraplex_adapter_store.sources.local import read_directory

    limits = StoreLimits()
    files = read_directory(folder, limits)
    config = AdapterConfig.parse(files.config, limits)
    with SafetensorsFile(files.weights, limits) as tensors:
        return read_adapter(
            config,
            tensors,
            base,
            limits,
            chat_template=files.chat_template,
            companions=files.companions,
        )


def _print_inspection(report: dict[str, Any], modules: tuple[ModuleInspection, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{report['family']}, {report['scale_rule']}, digest {report['digest'][:12]}")
    table = Table("module", "rank", "effective", "‖ΔW‖/‖W‖", "spectrum", "intruders", box=None)
    for module in modules:
        table.add_row(
            module.module,
            str(module.rank),
            f"{module.effective_rank:.1f}",
            f"{module.delta_ratio:.4f}",
            spark(module.singular_values),
            "" if module.n_intruders is None else str(module.n_intruders),
        )
    console.print(table)
    if modules and modules[0].n_intruders is not None:
        total = sum(module.n_intruders or 0 for module in modules)
        console.print(f"intruder dimensions: {total} in {len(modules)} modules")


def spark(values: tuple[float, ...], width: int = 24) -> str:
    """Draw a spectrum as a line of blocks. The largest value has the tallest block."""
    if not values or values[0] <= 0:
        return ""
    step = max(1, len(values) // width)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[min(7, int(8 * value / values[0]))] for value in values[::step][:width])
